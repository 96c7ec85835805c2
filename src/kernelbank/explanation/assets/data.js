"use strict";
// The arrays of a layer, and the weights of one position. Everything comes from this file: nothing is fetched.

const DATA = JSON.parse(document.getElementById("data").textContent);
const TYPES = { u8: Uint8Array, i8: Int8Array, f32: Float32Array };
const arrays = new Map(); // blob id -> promise of its arrays by name
const ready = new Map(); // blob id -> the arrays themselves

async function inflate(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

function load(blob) {
  if (!arrays.has(blob.id)) {
    arrays.set(blob.id, inflate(document.getElementById(blob.id).textContent).then((buffer) => {
      const parts = {};
      for (const [name, type, offset, length] of blob.parts) {
        const size = TYPES[type].BYTES_PER_ELEMENT;
        parts[name] = new TYPES[type](buffer.slice(offset, offset + length * size));
      }
      ready.set(blob.id, parts);
      return parts;
    }));
  }
  return arrays.get(blob.id);
}

// A layer with its arrays for one image: `view.weights(part, head, token)` is what the page draws.
class View {
  constructor(layer, parts) {
    this.layer = layer;
    this.parts = parts;
    [this.height, this.width] = layer.grid;
    this.cells = this.height * this.width;
    this.tokens = layer.prefix + this.cells;
    this.kernelGrid = layer.grid.map((side) => Math.ceil(side / layer.stride));
    this.size = layer.place ? layer.prefix + this.kernelGrid[0] * this.kernelGrid[1] : layer.kernels;
  }

  // The kernels that a token sees, as tokens in the order of the map; null where it sees all.
  seen(token) {
    const { rows, columns, prefix } = this.layer;
    if (!rows || token < prefix) return null;
    const cell = token - prefix;
    const list = [];
    for (let p = 0; p < prefix; p++) list.push(p);
    for (const y of rows[Math.floor(cell / this.width)])
      for (const x of columns[cell % this.width]) list.push(prefix + y * this.width + x);
    return list;
  }

  // p_ij from the relative table, whose offsets are those of the padded grid that some checkpoints run on.
  position(head, i, j) {
    const { prefix, table } = this.layer;
    const scale = table.scales[head];
    if (i < prefix || j < prefix) {
      const entry = i < prefix && j < prefix ? 2 : i < prefix ? 0 : 1;
      return table.prefix[head][entry];
    }
    const [a, b] = table.sides, w = this.width;
    const dy = table.rows[Math.floor((i - prefix) / w)] - table.rows[Math.floor((j - prefix) / w)];
    const dx = table.columns[(i - prefix) % w] - table.columns[(j - prefix) % w];
    const at = (dy + (a - 1) / 2) * b + dx + (b - 1) / 2;
    return (this.parts.table[head * a * b + at] * scale) / 127;
  }

  // The part ("effective", "dynamic" or "static") of a head at a token: values by token, NaN where not seen.
  weights(part, head, token) {
    const out = new Float32Array(this.size).fill(NaN);
    const seen = this.seen(token);
    const at = (k) => (seen ? seen[k] : k);
    const count = seen ? seen.length : this.size;
    const { layer, parts } = this;
    if (layer.kind === "map" && part !== "static") {
      const name = part === "effective" ? "map" : "scores";
      if (!parts[name]) return null;
      const base = head * this.tokens + token;
      const unit = parts[name + "_scale"][base] / layer[name + "_levels"];
      for (let k = 0; k < count; k++) out[at(k)] = parts[name][base * layer.slots + k] * unit;
      return out;
    }
    if (part === "static" && !layer.table) return null;
    const gate = parts.gate ? parts.gate[head * this.tokens + token] : 0;
    for (let k = 0; k < count; k++)
      out[at(k)] = (part === "static" ? 0 : gate) + (part !== "dynamic" && layer.table ? this.position(head, token, at(k)) : 0);
    return out;
  }

  // The k x k kernel of a head at a token.
  kernel(head, token) {
    const { layer, parts } = this;
    const taps = layer.size * layer.size;
    const place = layer.kernel_positions > 1 ? token : 0;
    const base = place * layer.heads + head;
    const unit = parts.kernels_scale[base] / 127;
    return Float32Array.from({ length: taps }, (_, t) => parts.kernels[base * taps + t] * unit);
  }

  // The mean of a part over heads.
  mean(part, token) {
    let sum = null;
    for (let head = 0; head < this.layer.heads; head++) {
      const one = this.weights(part, head, token);
      if (!one) return null;
      if (!sum) sum = one;
      else for (let k = 0; k < one.length; k++) sum[k] += one[k];
    }
    for (let k = 0; k < sum.length; k++) sum[k] /= this.layer.heads;
    return sum;
  }

  meanKernel(token) {
    const sum = new Float32Array(this.layer.size ** 2);
    for (let head = 0; head < this.layer.heads; head++)
      this.kernel(head, token).forEach((value, t) => (sum[t] += value / this.layer.heads));
    return sum;
  }
}

// Numbers of a row of weights: what is visible, its sum, extent and effective number.
function describe(values) {
  let sum = 0, size = 0, top = 0, low = Infinity, high = -Infinity, best = -1, seen = 0, zero = 0;
  for (let k = 0; k < values.length; k++) {
    const v = values[k];
    if (Number.isNaN(v)) continue;
    seen++;
    sum += v;
    size += Math.abs(v);
    if (v === 0) zero++;
    if (v < low) low = v;
    if (v > high) high = v;
    if (Math.abs(v) > top) { top = Math.abs(v); best = k; }
  }
  let entropy = 0;
  for (const v of values) if (v && size > 0) entropy -= (Math.abs(v) / size) * Math.log(Math.abs(v) / size);
  return { sum, top, low, high, best, seen, zero, effective: size > 0 ? Math.exp(entropy) : 0 };
}

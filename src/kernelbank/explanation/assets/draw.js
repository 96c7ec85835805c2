"use strict";
// Colours and canvases. Zero is the neutral colour, positive weights are orange, negative ones blue; both ramps are
// monotone in lightness and remain distinct with any common colour vision deficiency.

const RAMPS = {
  light: {
    positive: [[247, 245, 240], [254, 204, 128], [240, 127, 32], [178, 62, 6], [92, 24, 4]],
    negative: [[247, 245, 240], [158, 202, 225], [66, 140, 200], [20, 84, 158], [6, 38, 92]],
  },
  dark: {
    positive: [[30, 32, 38], [104, 48, 10], [196, 92, 14], [250, 158, 58], [255, 232, 178]],
    negative: [[30, 32, 38], [20, 62, 106], [34, 112, 180], [98, 178, 236], [208, 236, 255]],
  },
};

function theme() {
  return document.documentElement.dataset.theme;
}

// The colour of v in [-1, 1].
function colour(v) {
  const ramp = RAMPS[theme()][v < 0 ? "negative" : "positive"];
  const at = Math.min(Math.abs(v), 1) * (ramp.length - 1);
  const low = Math.min(Math.floor(at), ramp.length - 2), part = at - low;
  return ramp[low].map((c, i) => c + (ramp[low + 1][i] - c) * part);
}

const scratch = document.createElement("canvas");

// A map of at most height x width values as an image in `scratch`; `alpha` makes zero transparent, unseen is always so.
function paint(values, height, width, top, alpha) {
  scratch.width = width;
  scratch.height = height;
  const context = scratch.getContext("2d");
  const image = context.createImageData(width, height);
  for (let k = 0; k < values.length; k++) {
    const v = values[k];
    if (Number.isNaN(v)) continue;
    const share = top > 0 ? v / top : 0;
    const [r, g, b] = colour(share);
    const opacity = alpha ? Math.min(1, 0.08 + 1.15 * Math.sqrt(Math.abs(share))) * 215 : 255;
    image.data.set([r, g, b, opacity], 4 * k);
  }
  context.putImageData(image, 0, 0);
  return scratch;
}

// The canvas sized to its place on the page, in device pixels; its context.
function fit(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  return context;
}

// The picture without its colours, so that those of the weights stand out.
const greys = new Map();
function grey(image) {
  const key = image.src.length + theme() + image.src.slice(-64);
  if (!greys.has(key)) {
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
    const d = pixels.data;
    const [gain, lift] = theme() === "light" ? [0.62, 92] : [0.55, 8];
    for (let i = 0; i < d.length; i += 4) {
      const y = 0.3 * d[i] + 0.59 * d[i + 1] + 0.11 * d[i + 2];
      for (let c = 0; c < 3; c++) d[i + c] = (0.86 * y + 0.14 * d[i + c]) * gain + lift;
    }
    context.putImageData(pixels, 0, 0);
    greys.set(key, canvas);
  }
  return greys.get(key);
}

// A frame around cells [top, left, bottom, right) of a grid.
function frame(context, box, height, width, style, dash) {
  const { width: W, height: H } = context.canvas;
  const [top, left, bottom, right] = box;
  const ratio = window.devicePixelRatio || 1;
  const line = (colour_, thickness) => {
    context.strokeStyle = colour_;
    context.lineWidth = thickness * ratio;
    context.strokeRect((left / width) * W, (top / height) * H, ((right - left) / width) * W, ((bottom - top) / height) * H);
  };
  context.setLineDash([]);
  line("rgba(0,0,0,.75)", style === "cell" ? 4 : 3);
  context.setLineDash(dash ? [5 * ratio, 4 * ratio] : []);
  line("#fff", style === "cell" ? 2 : 1.5);
  context.setLineDash([]);
}

function gridLines(context, height, width) {
  const { width: W, height: H } = context.canvas;
  if (Math.min(W / width, H / height) < 7) return;
  context.strokeStyle = theme() === "light" ? "rgba(255,255,255,.35)" : "rgba(0,0,0,.35)";
  context.lineWidth = 1;
  context.beginPath();
  for (let y = 1; y < height; y++) { context.moveTo(0, (y / height) * H); context.lineTo(W, (y / height) * H); }
  for (let x = 1; x < width; x++) { context.moveTo((x / width) * W, 0); context.lineTo((x / width) * W, H); }
  context.stroke();
}

// The scale of colours from low to high, drawn into a canvas.
function legend(canvas, signed) {
  const context = fit(canvas);
  const { width: W, height: H } = canvas;
  for (let x = 0; x < W; x++) {
    const share = x / (W - 1);
    context.fillStyle = `rgb(${colour(signed ? 2 * share - 1 : share).map(Math.round).join()})`;
    context.fillRect(x, 0, 1, H);
  }
}

function number(v) {
  if (!Number.isFinite(v)) return "–";
  if (v === 0) return "0";
  const size = Math.abs(v);
  if (size !== 0 && (size < 0.0005 || size >= 1e5)) return v.toExponential(1).replace("-", "−");
  return (size >= 100 ? v.toFixed(0) : size >= 10 ? v.toFixed(1) : size >= 1 ? v.toFixed(2) : v.toPrecision(2))
    .replace("-", "−");
}

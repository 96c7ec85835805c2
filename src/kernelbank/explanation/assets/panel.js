"use strict";
// What a model's half of the page shows: with the layer its heads, parts and chart, with the position their values.

// ---- what changes with the layer ----

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function build(panel) {
  const { root, view, model } = panel;
  const { layer } = view;
  $(".layer-name b", root).textContent = layer.name;
  $(".layer-name code", root).textContent = layer.spec;
  $(".done", root).textContent = [...model.images[state.image].notes, ...layer.notes,
    ...(layer.scores === false ? ["query · key is left out to keep the page small; fewer layers have it"] : []),
    ...(layer.coarse ? ["weights of this layer have 5 bits"] : [])].join(" · ");
  const canvas = $(".picture", root);
  canvas.style.aspectRatio = `${panel.image.naturalWidth} / ${panel.image.naturalHeight}`;
  const heads = $(".heads", root);
  heads.replaceChildren(...[-1, ...Array(layer.heads).keys()].map((head) => {
    const shape = shapeOf(view);
    const canvas_ = element("canvas", { style: `aspect-ratio:${shape[1]} / ${shape[0]}` });
    const label = element("span", {}, head < 0 ? "mean" : `head ${head}`, element("small"));
    const button = element("button", { type: "button" }, canvas_, label);
    button.addEventListener("click", () => { state.head = head; draw(); });
    return button;
  }));
  $(".head-note", root).textContent = layer.kind === "kernel"
    ? "kernels, averaged over the channels of a head" : "their effective number of kernels at this position";
  const chips = $(".chips", root);
  chips.replaceChildren(...Array.from({ length: layer.prefix }, (_, p) => {
    const button = element("button", { type: "button" }, element("i"), tokenName(layer, p));
    button.addEventListener("click", () => (state.token === p ? move(state.y, state.x) : move(state.y, state.x, p)));
    return button;
  }));
  const parts = $(".parts", root);
  panel.parts = partsOf(view);
  parts.replaceChildren(...panel.parts.map(([, title, text]) => {
    const shape = shapeOf(view);
    return element("figure", {}, element("canvas", { style: `aspect-ratio:${shape[1]} / ${shape[0]}` }),
      element("figcaption", {}, title, element("small", {}, text)));
  }));
  $(".parts-title", root).hidden = panel.parts.length === 0;
  const list = $(".coefficients", root);
  const mixed = layer.coefficients ?? [];
  list.replaceChildren(...(mixed.length ? [element("h3", {}, "Coefficients that mix the static kernels")] : []),
    ...mixed.map((value, k) => element("div", {}, `kernel ${k}`,
      element("span", { class: "bar", style: `width:${(100 * value) / Math.max(...mixed)}%` }), number(value))));
  classes(panel);
  chart(panel);
}

function shapeOf(view) {
  const { layer } = view;
  if (layer.kind === "kernel") return [layer.size, layer.size];
  if (!layer.place) { const w = Math.ceil(Math.sqrt(layer.kernels)); return [Math.ceil(layer.kernels / w), w]; }
  return view.kernelGrid;
}

function partsOf(view) {
  const { layer, parts } = view;
  if (layer.kind === "kernel") return layer.table ? [["static", "positional part", "p, which weighs the other kernels"]] : [];
  const two = layer.kind === "map";
  const all = [];
  if (!two || parts.scores) all.push(["dynamic", "dynamic part", two ? "query · key, before the activation" : "query / n, the same for every kernel seen"]);
  if (layer.table) all.push(["static", "positional part", two ? "p, added to it; the same for every image" : "p, the same for every image"]);
  if (all.length) all.push(["effective", "effective kernel", two ? `after ${layer.activation}` : "their sum"]);
  return all;
}

function classes({ root, model }) {
  const rows = model.images[state.image].classes;
  $(".classes", root).hidden = rows.length === 0;
  $(".classes ol", root).replaceChildren(...rows.map(([name, share]) => {
    const item = element("li", { title: name }, element("span", {}, name), element("span", {}, `${(100 * share).toFixed(1)} %`));
    item.style.setProperty("--share", `${100 * share}%`);
    return item;
  }));
}

// ---- what changes with the position ----

function rowsOf(view) {
  const token = tokenOf(view);
  const get = (head) => (view.layer.kind === "kernel"
    ? (head < 0 ? view.meanKernel(token) : view.kernel(head, token))
    : (head < 0 ? view.mean("effective", token) : view.weights("effective", head, token)));
  return { token, rows: [-1, ...Array(view.layer.heads).keys()].map(get) };
}

function draw() {
  const start = performance.now();
  for (const panel of panels) if (panel.view) drawPanel(panel);
  window.kernelbank.lastMove = performance.now() - start;
}

function onGrid(view, values) {
  return view.layer.kind === "kernel" || !view.layer.place ? values : values.subarray(view.layer.prefix);
}

function drawPanel(panel) {
  const { root, view } = panel;
  const { token, rows } = rowsOf(view);
  const facts = rows.map(describe);
  const head = headOf(view), chosen = rows[head + 1], fact = facts[head + 1];
  const shared = Math.max(...facts.map((f) => f.top));
  const top = (f) => (state.scale === "heads" ? shared : f.top);
  const signed = fact.low < 0;
  drawPicture(panel, token, chosen, top(fact));
  const shape = shapeOf(view);
  const box = boxOf(view, token) ?? [0, 0, ...shape];
  [...$(".heads", root).children].forEach((button, index) => {
    tile($("canvas", button), onGrid(view, rows[index]), shape, top(facts[index]), box, markOf(view, token));
    button.setAttribute("aria-pressed", index - 1 === head);
    $("small", button).textContent = number(facts[index].effective);
  });
  drawParts(panel, token, head, box);
  $(".parts-title", root).replaceChildren("Parts ", element("small", {}, head < 0 ? "mean over heads" : `head ${head}`));
  legend($(".legend canvas", root), signed);
  $(".legend .low", root).textContent = signed ? number(-top(fact)) : "0";
  $(".legend .high", root).textContent = number(top(fact));
  [...$(".chips", root).children].forEach((chip, p) => {
    chip.setAttribute("aria-pressed", token === p);
    const placed = view.layer.kind !== "kernel" && view.layer.place && top(fact) > 0;
    $("i", chip).style.background = `rgb(${colour(placed ? chosen[p] / top(fact) : 0).map(Math.round).join()})`;
  });
  $(".facts", root).textContent = sentence(view, token, head, chosen, fact);
}

// The parts in one colour scale where they add up: the scores of a map, or all of a depth-wise kernel.
function drawParts(panel, token, head, box) {
  const { root, view } = panel;
  const found = panel.parts.map(([part]) => (head < 0 ? view.mean(part, token) : view.weights(part, head, token)));
  const facts = found.map(describe);
  const added = view.layer.kind === "map" ? facts.filter((_, index) => panel.parts[index][0] !== "effective") : facts;
  panel.parts.forEach(([part, , text], index) => {
    const figure = $(".parts", root).children[index], fact = facts[index];
    const grid = part === "static" && view.layer.kind === "kernel"; // p lies on the grid, the kernel in its own square
    const values = grid ? found[index].subarray(view.layer.prefix) : onGrid(view, found[index]);
    const shape = grid ? [view.height, view.width] : shapeOf(view);
    const top = added.includes(fact) ? Math.max(...added.map((one) => one.top)) : fact.top;
    tile($("canvas", figure), values, shape, top, grid ? [0, 0, ...shape] : box, markOf(view, token));
    figure.dataset.range = `${number(fact.low)} to ${number(fact.high)}`;
    $("small", figure).textContent = `${text}: ${figure.dataset.range}`;
  });
}

// What the tiles show of a map: the window or neighbourhood of a position, [top, left, bottom, right); null: all of it.
function boxOf(view, token) {
  const { layer } = view, cell = token - layer.prefix;
  if (!layer.rows || layer.kind === "kernel" || cell < 0) return null;
  return regionOf(layer, Math.floor(cell / view.width), cell % view.width);
}

// The cell of the position in a map that has the grid of the positions; null in every other map.
function markOf(view, token) {
  const cell = token - view.layer.prefix;
  if (view.layer.kind === "kernel" || !view.layer.place || view.layer.stride > 1 || cell < 0) return null;
  return [Math.floor(cell / view.width), cell % view.width];
}

function drawPicture(panel, token, values, top) {
  const { root, view, image } = panel;
  const { layer } = view;
  const context = fit($(".picture", root));
  const { width: W, height: H } = context.canvas;
  context.imageSmoothingEnabled = true;
  context.drawImage(grey(image), 0, 0, W, H);
  context.imageSmoothingEnabled = false;
  const cell = token - layer.prefix, y = Math.floor(cell / view.width), x = cell % view.width;
  if (state.alone) {
    context.drawImage(image, 0, 0, W, H);
    gridLines(context, view.height, view.width);
  } else if (layer.kind === "kernel") {
    const half = (layer.size - 1) / 2, s = layer.size;
    if (cell >= 0) {
      paint(values, s, s, top, true);
      context.drawImage(scratch, ((x - half) / view.width) * W, ((y - half) / view.height) * H, (s / view.width) * W, (s / view.height) * H);
    }
    gridLines(context, view.height, view.width);
    if (cell >= 0 && s > 1) frame(context, [y - half, x - half, y + half + 1, x + half + 1], view.height, view.width, "region", true);
  } else if (layer.place) {
    const [rows, columns] = view.kernelGrid, { stride } = layer;
    context.drawImage(paint(values.subarray(layer.prefix), rows, columns, top, true), 0, 0,
      ((columns * stride) / view.width) * W, ((rows * stride) / view.height) * H);
    gridLines(context, view.height, view.width);
    if (layer.rows && cell >= 0) frame(context, regionOf(layer, y, x), view.height, view.width, "region", true);
  }
  if (cell >= 0) frame(context, [y, x, y + 1, x + 1], view.height, view.width, "cell", false);
}

function regionOf(layer, y, x) {
  const rows = layer.rows[y], columns = layer.columns[x];
  return [rows[0], columns[0], rows.at(-1) + 1, columns.at(-1) + 1];
}

// A map of [height, width] values, of which the cells of `box` fill the canvas; `mark` is framed.
function tile(canvas, values, [height, width], top, box, mark) {
  const context = fit(canvas);
  const [up, left, down, right] = box, { width: W, height: H } = canvas;
  const side = Math.min(W / (right - left), H / (down - up));
  const x = (W - side * (right - left)) / 2, y = (H - side * (down - up)) / 2;
  context.clearRect(0, 0, W, H);
  context.drawImage(paint(values, height, width, top, false), left, up, right - left, down - up,
    x, y, side * (right - left), side * (down - up));
  if (!mark) return;
  context.strokeStyle = theme() === "light" ? "#111" : "#fff";
  context.lineWidth = Math.max(1, W / 160);
  context.strokeRect(x + (mark[1] - left) * side, y + (mark[0] - up) * side, Math.max(side, 3), Math.max(side, 3));
}

// The name of a token before the grid.
function tokenName(layer, token) {
  return layer.names[token] ?? `prefix ${token + 1}`;
}

function placeOf(view, token, width = view.width) {
  const { prefix } = view.layer;
  if (token < prefix) return `the ${tokenName(view.layer, token)} token`;
  return `row ${Math.floor((token - prefix) / width) + 1}, column ${((token - prefix) % width) + 1}`;
}

// Whole numbers in ascending order, counted from 1, as "1 to 4, 6".
function spans(list) {
  const found = [];
  for (const at of list) {
    if (found.length && found.at(-1)[1] === at - 1) found.at(-1)[1] = at;
    else found.push([at, at]);
  }
  return found.map(([low, high]) => (low === high ? `${low + 1}` : `${low + 1} to ${high + 1}`)).join(", ");
}

function sentence(view, token, head, values, fact) {
  const { layer } = view;
  const who = head < 0 ? "Mean over heads" : `Head ${head}`;
  const place = placeOf(view, token).replace(/^./, (c) => c.toUpperCase());
  if (layer.kind === "kernel") {
    const shared = layer.kernel_positions > 1 ? "a kernel of its own" : "the kernel that all positions share";
    return `${place}: ${shared}, ${layer.size} × ${layer.size}. ${who}: ${number(fact.low)} to ${number(fact.high)}, `
      + `sum ${number(fact.sum)}.`;
  }
  const distribution = fact.low >= -1e-6 && Math.abs(fact.sum - 1) < 0.02;
  const kind = distribution ? "the weights are a distribution (sum 1)"
    : `the weights are no distribution (sum ${number(fact.sum)}${fact.low < 0 ? ", some negative" : ""})`;
  const zero = fact.zero / fact.seen > 0.2 ? `, ${Math.round((100 * fact.zero) / fact.seen)} % of them 0` : "";
  const cell = token - layer.prefix;
  const window_ = boxOf(view, token) ? `, which sees rows ${spans(layer.rows[Math.floor(cell / view.width)])}, columns ${
    spans(layer.columns[cell % view.width])}` : "";
  const best = layer.place ? ` at ${placeOf(view, fact.best, view.kernelGrid[1])}${layer.stride > 1 ? " of the kernels" : ""}` : ` of kernel ${fact.best}`;
  return `${place}${window_}. ${who}: effective number ${number(fact.effective)} of ${fact.seen} kernels${zero}; ${kind}; `
    + `largest ${number(values[fact.best] ?? 0)}${fact.best < 0 ? "" : best}.`;
}

// ---- the chart over depth ----

function chart({ root }) {
  const select = $(".depth select", root), key = select.value || "effective";
  const series = DATA.models.map((model) => model.layers.map((layer) => layer.images[state.image].meta.statistics[key]));
  const values = series.flat().filter((v) => v !== null);
  const high = Math.max(...values, 1e-9), low = Math.min(...values, 0);
  const at = (v) => 100 - ((v - low) / (high - low)) * 88;
  const x = (i, n) => 30 + (n > 1 ? (i / (n - 1)) * 262 : 131);
  const lines = series.map((line, m) => {
    const points = line.map((v, i) => (v === null ? null : `${x(i, line.length)},${at(v)}`)).filter(Boolean);
    return `<polyline class="${m ? "second" : "first"}" points="${points.join(" ")}"/>`
      + points.map((p) => `<circle class="${m ? "second" : "first"}" r="2.4" cx="${p.split(",")[0]}" cy="${p.split(",")[1]}"/>`).join("");
  });
  const now = x(state.depth, deepest + 1);
  $(".depth svg", root).innerHTML = `<line class="axis" x1="30" y1="${at(0)}" x2="292" y2="${at(0)}"/>
    <line class="now" x1="${now}" y1="8" x2="${now}" y2="100"/>
    <text x="26" y="${at(high) + 4}" text-anchor="end">${number(high)}</text>
    <text x="26" y="${at(low) + 3}" text-anchor="end">${number(low)}</text>
    <text x="30" y="116">layer 1</text><text x="292" y="116" text-anchor="end">${deepest + 1}</text>
    ${lines.join("")}<rect x="20" y="0" width="280" height="120"/>`;
}

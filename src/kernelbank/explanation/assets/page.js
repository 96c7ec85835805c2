"use strict";
// The state of the page and its events: one position, linked between the models by its place on the picture.

const $ = (selector, root = document) => root.querySelector(selector);
const state = { image: 0, depth: 0, head: -1, y: 0.5, x: 0.5, token: null, scale: "position" };
const panels = DATA.models.map((model, index) => ({ model, root: $(`[data-model="${index}"]`), view: null, image: null }));
const deepest = Math.max(...DATA.models.map((model) => model.layers.length)) - 1;

// ---- state ----

function layerIndex(model, depth = state.depth) {
  return deepest === 0 ? 0 : Math.round((depth / deepest) * (model.layers.length - 1));
}

function tokenOf(view) {
  const { prefix } = view.layer;
  if (state.token !== null && state.token < prefix) return state.token;
  return prefix + Math.min(view.height - 1, Math.floor(state.y * view.height)) * view.width
    + Math.min(view.width - 1, Math.floor(state.x * view.width));
}

function headOf(view) {
  return state.head < 0 ? -1 : Math.min(state.head, view.layer.heads - 1);
}

function move(y, x, token = null) {
  state.y = Math.min(Math.max(y, 0), 1 - 1e-6);
  state.x = Math.min(Math.max(x, 0), 1 - 1e-6);
  state.token = token;
  draw();
}

function step(dy, dx) {
  const { view } = panels[0];
  const token = state.token === null ? tokenOf(view) - view.layer.prefix : 0;
  const y = Math.floor(token / view.width) + dy, x = (token % view.width) + dx;
  move((Math.min(Math.max(y, 0), view.height - 1) + 0.5) / view.height,
    (Math.min(Math.max(x, 0), view.width - 1) + 0.5) / view.width);
}

async function show(depth = state.depth, image = state.image) {
  state.depth = Math.min(Math.max(depth, 0), deepest);
  state.image = image;
  const wanted = `${state.depth} ${image}`;
  for (const panel of panels) {
    const layer = panel.model.layers[layerIndex(panel.model)];
    const parts = { ...(layer.shared ? await load(layer.shared) : {}), ...(await load(layer.images[image].blob)) };
    if (wanted !== `${state.depth} ${state.image}`) return;
    panel.view = new View({ ...layer, ...layer.images[image].meta }, parts);
    panel.image = await picture(panel.model.images[image].src);
  }
  panels.forEach(build);
  $("#layer").value = state.depth;
  $("#layer-text").textContent = `${state.depth + 1} of ${deepest + 1}`;
  document.querySelectorAll("#pictures button").forEach((b, i) => b.setAttribute("aria-pressed", i === image));
  draw();
}

const pictures = new Map();
function picture(src) {
  if (!pictures.has(src)) {
    pictures.set(src, new Promise((done) => {
      const image = new Image();
      image.onload = () => done(image);
      image.src = src;
    }));
  }
  return pictures.get(src);
}

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
    ...(layer.scores === false ? ["query · key is left out to keep the page small"] : []),
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
    const button = element("button", { type: "button" }, element("i"), DATA.prefix_names[p] ?? `token ${p}`);
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
  const [h, w] = shapeOf(view);
  [...$(".heads", root).children].forEach((button, index) => {
    tile($("canvas", button), onGrid(view, rows[index]), h, w, top(facts[index]), view, token);
    button.setAttribute("aria-pressed", index - 1 === head);
    $("small", button).textContent = number(facts[index].effective);
  });
  panel.parts.forEach(([part], index) => {
    const figure = $(".parts", root).children[index];
    const values = head < 0 ? view.mean(part, token) : view.weights(part, head, token);
    const own = describe(values), fixed = part === "static" && view.layer.kind === "kernel";
    if (fixed) figure.firstChild.style.aspectRatio = `${view.width} / ${view.height}`;
    tile($("canvas", figure), fixed ? values.subarray(view.layer.prefix) : onGrid(view, values), fixed ? view.height : h, fixed ? view.width : w,
      own.top, view, token);
    figure.dataset.range = `${number(own.low)} to ${number(own.high)}`;
    $("small", figure).textContent = `${panel.parts[index][2]}: ${figure.dataset.range}`;
  });
  $(".parts-title", root).replaceChildren("Parts ", element("small", {}, head < 0 ? "mean over heads" : `head ${head}`));
  legend($(".legend canvas", root), signed);
  $(".legend .low", root).textContent = signed ? number(-top(fact)) : "0";
  $(".legend .high", root).textContent = number(top(fact));
  [...$(".chips", root).children].forEach((chip, p) => {
    chip.setAttribute("aria-pressed", token === p);
    const v = view.layer.kind !== "kernel" && view.layer.place ? chosen[p] / top(fact) : 0;
    $("i", chip).style.background = `rgb(${colour(v).map(Math.round).join()})`;
  });
  $(".facts", root).textContent = sentence(view, token, head, chosen, fact);
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
  if (layer.kind === "kernel") {
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

function tile(canvas, values, height, width, top, view, token) {
  const context = fit(canvas);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(paint(values, height, width, top, false), 0, 0, canvas.width, canvas.height);
  if (height !== view.height || width !== view.width || token < view.layer.prefix) return;
  const cell = token - view.layer.prefix, y = Math.floor(cell / width), x = cell % width;
  const side = Math.max(canvas.width / width, 3);
  context.strokeStyle = theme() === "light" ? "#111" : "#fff";
  context.lineWidth = Math.max(1, canvas.width / 160);
  context.strokeRect((x / width) * canvas.width, (y / height) * canvas.height, side, side);
}

function placeOf(view, token, width = view.width) {
  const { prefix } = view.layer;
  if (token < prefix) return `the ${DATA.prefix_names[token] ?? `token ${token}`} token`;
  return `row ${Math.floor((token - prefix) / width) + 1}, column ${((token - prefix) % width) + 1}`;
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
  const kind = distribution ? "sum 1, a distribution" : `sum ${number(fact.sum)}, no distribution`
    + (fact.low < 0 ? ", some negative" : "");
  const zero = fact.zero / fact.seen > 0.2 ? `, ${Math.round((100 * fact.zero) / fact.seen)} % of them 0` : "";
  const best = layer.place ? ` at ${placeOf(view, fact.best, view.kernelGrid[1])}${layer.stride > 1 ? " of the kernels" : ""}` : ` of kernel ${fact.best}`;
  return `${place}. ${who}: as many as ${number(fact.effective)} of ${fact.seen} kernels${zero}; weights ${kind}; `
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

// ---- events ----

function point(event) {
  const box = event.currentTarget.getBoundingClientRect();
  move((event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width);
}

const KEYS = {
  ArrowUp: () => step(-1, 0), ArrowDown: () => step(1, 0), ArrowLeft: () => step(0, -1), ArrowRight: () => step(0, 1),
  "[": () => show(state.depth - 1), "]": () => show(state.depth + 1),
  h: () => turnHead(1), H: () => turnHead(-1), t: () => setTheme(theme() === "light" ? "dark" : "light"),
};

function turnHead(by) {
  const count = Math.max(...panels.map((panel) => panel.view.layer.heads)) + 1;
  state.head = ((state.head + 1 + by + count) % count) - 1;
  draw();
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  draw();
}

function listen() {
  for (const panel of panels) {
    const canvas = $(".picture", panel.root);
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", (event) => { point(event); canvas.focus({ preventScroll: true }); });
    const select = $(".depth select", panel.root);
    select.replaceChildren(...Object.entries(DATA.statistics).map(([key, title]) => element("option", { value: key }, title)));
    select.addEventListener("change", () => {
      panels.forEach((other) => { $(".depth select", other.root).value = select.value; chart(other); });
    });
    $(".depth svg", panel.root).addEventListener("click", (event) => {
      const box = event.currentTarget.getBoundingClientRect();
      show(Math.round((((event.clientX - box.left) / box.width) * 300 - 30) / 262 * deepest));
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input") || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  $("#layer").max = deepest;
  $("#layer").addEventListener("input", (event) => show(Number(event.target.value)));
  $("#less").addEventListener("click", KEYS["["]);
  $("#more").addEventListener("click", KEYS["]"]);
  $("#theme").addEventListener("click", KEYS.t);
  document.querySelectorAll("#scale input").forEach((input) => input.addEventListener("change", () => { state.scale = input.value; draw(); }));
  const images = DATA.models[0].images;
  if (images.length > 1) {
    $("#pictures").append(...images.map(({ src, name }, index) => {
      const button = element("button", { type: "button", title: name }, element("img", { src, alt: name }));
      button.addEventListener("click", () => show(state.depth, index));
      return button;
    }));
  }
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
  new ResizeObserver(() => draw()).observe(document.body);
}

window.kernelbank = { state, panels, move, show, lastMove: 0, ready: false };
listen();
show(DATA.start.depth).then(() => { window.kernelbank.ready = true; });

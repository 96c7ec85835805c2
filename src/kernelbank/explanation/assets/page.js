"use strict";
// The state of the page and its events: one position, linked between the models by its place on the picture.

const $ = (selector, root = document) => root.querySelector(selector);
const state = { image: 0, depth: 0, head: -1, y: 0.5, x: 0.5, token: null, scale: "position", alone: false };
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
  window.kernelbank.ready = false;
  const wanted = `${state.depth} ${image}`;
  const loaded = await Promise.all(panels.map(async ({ model }) => {
    const layer = model.layers[layerIndex(model)];
    const parts = { ...(layer.shared ? await load(layer.shared) : {}), ...(await load(layer.images[image].blob)) };
    const view = new View({ ...layer, ...layer.images[image].meta, names: model.prefix }, parts);
    return { view, image: await picture(model.images[image].src) };
  }));
  if (wanted !== `${state.depth} ${state.image}`) return;
  panels.forEach((panel, index) => build(Object.assign(panel, loaded[index])));
  $("#layer").value = state.depth;
  $("#layer-text").textContent = `${state.depth + 1} of ${deepest + 1}`;
  document.querySelectorAll("#pictures button").forEach((b, i) => b.setAttribute("aria-pressed", i === image));
  draw();
  window.kernelbank.ready = true;
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

// ---- events ----

function point(event) {
  const box = event.currentTarget.getBoundingClientRect();
  move((event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width);
}

const KEYS = {
  ArrowUp: () => step(-1, 0), ArrowDown: () => step(1, 0), ArrowLeft: () => step(0, -1), ArrowRight: () => step(0, 1),
  "[": () => show(state.depth - 1), "]": () => show(state.depth + 1),
  h: () => turnHead(1), H: () => turnHead(-1), p: () => setAlone(!state.alone), t: () => setTheme(theme() === "light" ? "dark" : "light"),
};

function turnHead(by) {
  const count = Math.max(...panels.map((panel) => panel.view.layer.heads)) + 1;
  state.head = ((state.head + 1 + by + count) % count) - 1;
  draw();
}

function setAlone(alone) {
  state.alone = alone;
  $("#alone").checked = alone;
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
  $("#alone").addEventListener("change", (event) => setAlone(event.target.checked));
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
show(DATA.start.depth);

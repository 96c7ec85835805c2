"use strict";

/** The value of a CSS variable of the page. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Draw every figure in the colours of the reader's setting. */
function draw() {
  const text = colour("--text"), line = colour("--line");
  for (const place of document.querySelectorAll(".plot")) {
    const figure = JSON.parse(document.getElementById(place.dataset.figure).textContent);
    for (const trace of figure.data) {
      if (trace.meta !== "baseline") continue;
      if (trace.line) trace.line.color = text;
      if (trace.marker) trace.marker.color = text;
      if (trace.error_y) trace.error_y.color = text;
    }
    figure.layout.font = { color: text };
    for (const axis of ["xaxis", "yaxis"]) {
      Object.assign(figure.layout[axis], { gridcolor: line, linecolor: line, tickcolor: line });
    }
    Plotly.react(place, figure.data, figure.layout, { responsive: true, displaylogo: false });
  }
}

/** Sort the rows of a table by a column, numbers by value; a second click turns the order round. */
function sort(header) {
  const table = header.closest("table"), column = header.cellIndex;
  const descending = header.getAttribute("aria-sort") === "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const numeric = header.classList.contains("number"), body = table.tBodies[0];
  const value = (row) => {
    const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent.trim();
    return numeric ? (text === "" ? NaN : Number(text)) : text;
  };
  const rows = Array.from(body.rows).map((row) => [value(row), row]);
  rows.sort(([a], [b]) => {
    if (numeric) {
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return descending ? b - a : a - b;
    }
    return descending ? b.localeCompare(a) : a.localeCompare(b);
  });
  for (const [, row] of rows) body.append(row);
}

/** Open the details around the target of a link, so that the browser can scroll to it. */
function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let place = target; place; place = place.parentElement) if (place.tagName === "DETAILS") place.open = true;
  if (target) target.scrollIntoView();
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sort(button.closest("th")));
}
addEventListener("hashchange", reveal);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
reveal();

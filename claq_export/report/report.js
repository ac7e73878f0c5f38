"use strict";
// Sorting of the layer table: numbers by value, names by alphabet; a second click turns the order round.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => {
    head.querySelector("button").addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const value = (row) => row.cells[index].dataset.value;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const x = Number(value(a)), y = Number(value(b));
        const order = Number.isNaN(x) || Number.isNaN(y) ? value(a).localeCompare(value(b), undefined, { numeric: true }) : x - y;
        return rising ? order : -order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}

// The column view: histogram of a column's weights with its centroids and reserved weights.
const layers = JSON.parse(document.getElementById("columns").textContent);
const layerChoice = document.getElementById("layer");
const columnChoice = document.getElementById("column");
if (layerChoice) {
  layers.forEach((entry, i) => layerChoice.add(new Option(entry.layer, i)));
  const fill = () => {
    columnChoice.replaceChildren();
    layers[layerChoice.value].samples.forEach((s, i) =>
      columnChoice.add(new Option(`input feature ${s.feature} (${s.bits} bits)`, i)));
    draw();
  };
  layerChoice.addEventListener("change", fill);
  columnChoice.addEventListener("change", draw);
  fill();
}

function draw() {
  const sample = layers[layerChoice.value].samples[columnChoice.value];
  const width = 1000, height = 300, bottom = 262, top = 14;
  const x = (v) => 12 + ((v - sample.low) / (sample.high - sample.low)) * (width - 24);
  const most = Math.max(...sample.counts);
  const parts = [];
  const step = (width - 24) / sample.counts.length;
  sample.counts.forEach((count, i) => {
    const tall = (count / most) * (bottom - top);
    const from = sample.low + (i / sample.counts.length) * (sample.high - sample.low);
    if (count) {
      parts.push(`<rect class="hist" x="${(12 + i * step).toFixed(1)}" y="${(bottom - tall).toFixed(1)}" ` +
        `width="${(step - 1).toFixed(1)}" height="${tall.toFixed(1)}"><title>${count} weights from ${from.toPrecision(3)}</title></rect>`);
    }
  });
  sample.centroids.forEach((c) => parts.push(
    `<line class="centroid" x1="${x(c).toFixed(1)}" x2="${x(c).toFixed(1)}" y1="${top}" y2="${bottom + 8}"><title>centroid ${c}</title></line>`));
  sample.outliers.forEach((o) => parts.push(
    `<circle class="outlier" cx="${x(o).toFixed(1)}" cy="${bottom - 5}" r="4"><title>reserved weight ${o}</title></circle>`));
  parts.push(`<line class="axis" x1="12" x2="${width - 12}" y1="${bottom}" y2="${bottom}"/>`);
  for (const v of ticks(sample.low, sample.high)) {
    parts.push(`<text class="tick" font-size="13" text-anchor="middle" x="${x(v).toFixed(1)}" y="${bottom + 22}">${+v.toPrecision(6)}</text>`);
  }
  document.getElementById("histogram").innerHTML =
    `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="histogram and codebook">${parts.join("")}</svg>`;
}

function ticks(low, high) {
  const rough = (high - low) / 7, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high; v += step) found.push(Math.abs(v) < step / 1e6 ? 0 : v);
  return found;
}

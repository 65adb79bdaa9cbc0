// The map on a canvas as large as its window; scrolling moves what it shows. Cells with room for it hold words, value and verdict.

const FONT = "system-ui, sans-serif";
const ROOMY = { width: 92, widest: 210, height: 40, low: 26 };
const LEAST = 4; // pixels of a cell where the whole map is to be seen
const EDGE = { top: 10, right: 8 };

/** The sizes of everything: of cells, margins, window and whole. */
function layout(grid, width, tallest, whole) {
  const left = 62;
  const bottom = grid.wide || whole ? 44 : 58;
  const [rows, columns] = [Math.max(grid.rows.length, 1), Math.max(grid.places.length, 1)];
  const room = Math.max(width - left - EDGE.right, 60);
  const tall = tallest - bottom - EDGE.top;
  const share = room / columns;
  const cell = whole
    ? { width: Math.max(LEAST, share), height: Math.max(LEAST, Math.min(ROOMY.height, tall / rows)) }
    : { width: Math.min(ROOMY.widest, Math.max(ROOMY.width, share)), height: rows * ROOMY.height <= tall ? ROOMY.height : ROOMY.low };
  const full = { width: left + cell.width * columns + EDGE.right, height: EDGE.top + cell.height * rows + bottom };
  return { left, bottom, cell, full, window: { width, height: Math.min(full.height, tallest) } };
}

/** Whether all cells can have words without scrolling. */
const fits = (grid, width, tallest) =>
  grid.places.length * ROOMY.width <= width - 70 && grid.rows.length * ROOMY.low <= tallest - 70;

/** The cell under a point of the window; null beside the map. */
function hit(view, x, y) {
  const { left, bottom, cell, window } = view.sizes;
  if (x < left || y < EDGE.top || y > window.height - bottom) return null;
  const c = Math.floor((x - left + view.scroll.x) / cell.width);
  const down = Math.floor((y - EDGE.top + view.scroll.y) / cell.height);
  const r = view.grid.rows.length - 1 - down;
  return c >= 0 && c < view.grid.places.length && r >= 0 && r < view.grid.rows.length ? { r, c } : null;
}

/** Where a cell is in the window. */
function boxOf(view, { r, c }) {
  const { left, cell } = view.sizes;
  const down = view.grid.rows.length - 1 - r;
  return { x: left + c * cell.width - view.scroll.x, y: EDGE.top + down * cell.height - view.scroll.y, ...cell };
}

/** The rows and columns that can be seen. */
function seen(view) {
  const { left, bottom, cell, window } = view.sizes;
  const n = view.grid.rows.length;
  const from = Math.max(0, Math.floor(view.scroll.x / cell.width));
  const to = Math.min(view.grid.places.length, Math.ceil((view.scroll.x + window.width - left) / cell.width));
  const top = Math.max(0, Math.floor(view.scroll.y / cell.height));
  const low = Math.min(n, Math.ceil((view.scroll.y + window.height - bottom - EDGE.top) / cell.height));
  return { columns: [from, to], rows: [n - low, n - top] };
}

function paint(data, view) {
  const canvas = $("canvas");
  const { window: size, left, bottom } = view.sizes;
  const sharp = globalThis.devicePixelRatio || 1;
  const [wide, high] = [Math.round(size.width * sharp), Math.round(size.height * sharp)];
  if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
  canvas.style.width = `${size.width}px`;
  canvas.style.height = `${size.height}px`;
  const pen = canvas.getContext("2d");
  const colours = theme();
  pen.setTransform(sharp, 0, 0, sharp, 0, 0);
  pen.fillStyle = colours.paper;
  pen.fillRect(0, 0, size.width, size.height);
  const range = seen(view);
  pen.save();
  pen.beginPath();
  pen.rect(left, EDGE.top - 1, size.width - left, size.height - bottom - EDGE.top + 1);
  pen.clip();
  for (let r = range.rows[0]; r < range.rows[1]; r++) {
    for (let c = range.columns[0]; c < range.columns[1]; c++) paintCell(data, view, pen, colours, r, c);
  }
  for (const [at, colour, width] of [
    [view.hover, colours.ink, 1.5],
    [view.cell, colours.accent, 3],
  ]) {
    if (!at || at.r >= view.grid.rows.length || at.c >= view.grid.places.length) continue;
    const box = boxOf(view, at);
    pen.strokeStyle = colours.paper;
    pen.lineWidth = width + 2;
    pen.strokeRect(box.x + 1, box.y + 1, box.width - 2, box.height - 2);
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.strokeRect(box.x + 1, box.y + 1, box.width - 2, box.height - 2);
  }
  pen.restore();
  paintAxes(view, pen, colours, range);
}

function paintCell(data, view, pen, colours, r, c) {
  const { look, metric, grid, scale } = view;
  const i = cellAt(grid, r, c);
  const box = boxOf(view, { r, c });
  const what = state(data, look, metric.name, i);
  const gap = box.width >= 16 && box.height >= 10 ? 1 : 0;
  const [x, y, width, height] = [box.x, box.y, box.width - gap, box.height - gap];
  let ink = colours.ink;
  if (what === "value") {
    const colour = scale.colour(look.columns[metric.name][i]);
    pen.fillStyle = `rgb(${colour})`;
    pen.fillRect(x, y, gap ? width : Math.ceil(width) + 0.3, gap ? height : Math.ceil(height) + 0.3);
    ink = inkOn(colour);
  } else {
    fillState(pen, what, x, y, width, height, colours);
  }
  if (box.width < 44 || box.height < 16 || what === "empty") return;
  if (what !== "value") return label(pen, what === "none" ? shown(data, look, "text", i) || "not measured" : what === "nan" ? "NaN" : what, x, y, width, height, colours);
  const kind = verdict(data, look, i);
  const above = kind === "above";
  markVerdict(pen, kind, x + width - 9, y + 8, ink);
  pen.fillStyle = ink;
  pen.textBaseline = "middle";
  pen.textAlign = "start";
  const words = shown(data, look, "text", i) || "(nothing)";
  const two = height >= 34;
  pen.font = `${above ? "600 " : ""}12px ${FONT}`;
  pen.fillText(fitted(pen, words, width - 20), x + 6, y + (two ? 13 : height / 2 + 0.5));
  if (!two) return;
  pen.font = `11px ${FONT}`;
  pen.fillText(number(look.columns[metric.name][i], metric), x + 6, y + height - 11);
}

/** A word on a hatch, on a ground of its own so that it can be read. */
function label(pen, words, x, y, width, height, colours) {
  pen.font = `11px ${FONT}`;
  pen.textBaseline = "middle";
  pen.textAlign = "center";
  const fit = fitted(pen, words, width - 12);
  const wide = pen.measureText(fit).width + 8;
  pen.fillStyle = colours.panel;
  pen.fillRect(x + (width - wide) / 2, y + height / 2 - 8, wide, 16);
  pen.fillStyle = colours.ink;
  pen.fillText(fit, x + width / 2, y + height / 2 + 0.5);
}

/** Verdicts have shapes: a full triangle, an open circle, a cross. */
function markVerdict(pen, kind, x, y, ink) {
  pen.strokeStyle = pen.fillStyle = ink;
  pen.lineWidth = 1.2;
  pen.beginPath();
  if (kind === "above") {
    pen.moveTo(x - 4, y + 3);
    pen.lineTo(x, y - 4);
    pen.lineTo(x + 4, y + 3);
    return pen.fill();
  }
  if (kind === "same") pen.arc(x, y, 2.8, 0, 7);
  else (pen.moveTo(x - 3, y - 3), pen.lineTo(x + 3, y + 3), pen.moveTo(x + 3, y - 3), pen.lineTo(x - 3, y + 3));
  pen.stroke();
}

/** As much of a text as has room. */
function fitted(pen, words, room) {
  if (pen.measureText(words).width <= room) return words;
  const letters = [...words];
  let [low, high] = [0, letters.length];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (pen.measureText(`${letters.slice(0, middle).join("")}…`).width <= room) low = middle;
    else high = middle - 1;
  }
  return low ? `${letters.slice(0, low).join("")}…` : "";
}

/** Every how many-th label has room. */
const everyNth = (least) => [1, 2, 5, 10, 20, 50, 100, 200, 500].find((step) => step >= least) ?? 1000;

function paintAxes(view, pen, colours, range) {
  const { left, bottom, cell, window: size } = view.sizes;
  const { grid } = view;
  const foot = size.height - bottom;
  pen.fillStyle = colours.paper;
  pen.fillRect(0, 0, left - 1, size.height);
  pen.fillRect(0, foot, size.width, bottom);
  pen.font = `12px ${FONT}`;
  pen.textBaseline = "middle";
  pen.textAlign = "end";
  pen.fillStyle = colours.ink;
  const every = everyNth(16 / cell.height);
  for (let r = range.rows[0]; r < range.rows[1]; r++) {
    const y = boxOf(view, { r, c: 0 }).y + cell.height / 2;
    if (r % every === 0 && y > EDGE.top && y < foot - 4) pen.fillText(String(grid.rows[r]), left - 8, y);
  }
  pen.textAlign = "center";
  const step = everyNth((view.drawnWhole && !grid.wide ? 40 : 24) / cell.width);
  const words = cell.width >= 44;
  for (let c = range.columns[0]; c < range.columns[1]; c++) {
    const x = boxOf(view, { r: 0, c }).x + cell.width / 2;
    if (c % step !== 0 || x < left - 4) continue;
    const name = grid.labels[c];
    pen.fillStyle = colours.ink;
    if (typeof name === "string") pen.fillText(name, x, foot + 12);
    else {
      if (words) pen.fillText(fitted(pen, name.token, cell.width - 8), x, foot + 12);
      pen.fillStyle = colours.soft;
      pen.fillText(name.place, x, foot + (words ? 28 : 12));
    }
  }
  pen.fillStyle = colours.soft;
  pen.fillText(`${grid.columnName} →`, left + (size.width - left) / 2, size.height - 8);
  pen.translate(12, EDGE.top + (foot - EDGE.top) / 2);
  pen.rotate(-Math.PI / 2);
  pen.fillText(`${grid.rowName} →`, 0, 0);
  pen.setTransform(1, 0, 0, 1, 0, 0);
}

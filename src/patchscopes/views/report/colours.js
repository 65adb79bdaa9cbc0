// Colours: of values, of inks that can be read on them, and hatches for what is no value.

const SEQUENTIAL = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"]; // viridis
const DIVERGING = ["#2d004b", "#542788", "#8073ac", "#b2abd2", "#d8daeb", "#f7f7f7", "#fee0b6", "#fdb863", "#e08214", "#b35806", "#7f3b08"]; // PuOr, orange above zero
const DIVERGING_DARK = ["#cdb9ff", "#a78de6", "#8065c0", "#5c468c", "#3d3359", "#2b2c30", "#4b3a27", "#7a5120", "#ad6d18", "#e09428", "#ffc676"];

const rgb = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));

/** 256 colours between the stops, as [red, green, blue]. */
function ramp(stops) {
  const ends = stops.map(rgb);
  return Array.from({ length: 256 }, (_, k) => {
    const at = (k / 255) * (ends.length - 1);
    const low = Math.min(Math.floor(at), ends.length - 2);
    return ends[low].map((start, c) => Math.round(start + (ends[low + 1][c] - start) * (at - low)));
  });
}

/** Relative luminance, as the contrast of WCAG has it. */
function luminance(colour) {
  const [r, g, b] = colour.map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
/** Black or white, whichever has more contrast: at least 4.5 on any colour. */
const inkOn = (colour) => ((luminance(colour) + 0.05) ** 2 > 0.05 * 1.05 ? "#000" : "#fff");

const RAMPS = { sequential: ramp(SEQUENTIAL), diverging: ramp(DIVERGING), "diverging dark": ramp(DIVERGING_DARK) };
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;

/** The range of colours of a metric in a view: the 2nd to the 98th percentile of all its values, centred on zero if it is signed. */
function scaleOf(look, metric) {
  const values = look.columns[metric.name].filter((v) => v !== null && Number.isFinite(v)).sort((a, b) => a - b);
  const at = (share) => values[Math.round(share * (values.length - 1))];
  let [low, high] = values.length ? [at(0.02), at(0.98)] : [0, 1];
  if (metric.signed) {
    high = Math.max(Math.abs(low), Math.abs(high)) || 1;
    low = -high;
  } else if (low === high) {
    [low, high] = [low - 0.5, high + 0.5];
  }
  const colours = RAMPS[metric.signed ? (isDark() ? "diverging dark" : "diverging") : "sequential"];
  const colour = (v) => colours[Math.max(0, Math.min(255, Math.round((255 * (v - low)) / (high - low))))];
  return { low, high, colour, colours, below: values[0] < low, above: values.at(-1) > high, count: values.length };
}

/** The page's own colours, which follow light and dark. */
function theme() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(`--${name}`).trim();
  return { ink: of("ink"), soft: of("soft"), line: of("line"), paper: of("paper"), panel: of("panel"), accent: of("accent"), bad: of("bad") };
}

/** Fill a rectangle as its state says, so that no two states look the same, nor like a value. */
function fillState(pen, what, x, y, width, height, colours) {
  pen.save();
  pen.beginPath();
  pen.rect(x, y, width, height);
  pen.clip();
  pen.fillStyle = what === "empty" ? colours.paper : colours.panel;
  pen.fillRect(x, y, width, height);
  pen.strokeStyle = pen.fillStyle = what === "failed" ? colours.bad : colours.soft;
  pen.lineWidth = what === "failed" ? 1.5 : 1;
  pen.beginPath();
  const lines = (step, slope) => {
    for (let k = -height - step; k < width + height + step; k += step) {
      pen.moveTo(x + k, slope > 0 ? y + height : y);
      pen.lineTo(x + k + height, slope > 0 ? y : y + height);
    }
  };
  if (what === "failed" || what === "nan") lines(6, 1);
  if (what === "nan" || what === "none") lines(what === "nan" ? 6 : 9, -1);
  if (what === "waiting") for (let k = 3; k < height; k += 5) (pen.moveTo(x, y + k), pen.lineTo(x + width, y + k));
  pen.globalAlpha = what === "failed" ? 0.9 : 0.55;
  pen.stroke();
  if (what === "skipped") for (let a = 3; a < width; a += 6) for (let b = 3; b < height; b += 6) pen.fillRect(x + a, y + b, 1.6, 1.6);
  pen.restore();
}

// A card per metric: the win rate with its interval against 50%, and how the differences of the
// pairs' scores are spread.

const BINS = 12; // a side
const WIDTH = 340;
const LEFT = 14;
const RIGHT = WIDTH - 14;

function text(x, y, anchor, words, attributes = {}) {
  return shape("text", { x, y, "text-anchor": anchor, ...attributes }, words);
}

function winRateChart(result) {
  const rate = result.win_rate_a_over_b;
  const side = verdictOf(result);
  const x = (value) => LEFT + value * (RIGHT - LEFT);
  const [low, high] = [result.ci95_low, result.ci95_high];
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((value) =>
    text(x(value), 68, value === 0 ? "start" : value === 1 ? "end" : "middle", `${100 * value}%`));
  const described =
    `A wins ${percent(rate)} of the pairs, 95% interval ${percent(low)} to ${percent(high)}.`;
  return shape(
    "svg",
    { viewBox: `0 0 ${WIDTH} 74`, role: "img", "aria-label": described },
    shape("rect", { class: "track", x: LEFT, y: 34, width: RIGHT - LEFT, height: 16, rx: 8 }),
    shape("rect", {
      class: `fill-${side} soft`, x: x(low), y: 34, width: Math.max(3, x(high) - x(low)),
      height: 16, rx: 3,
    }),
    ...[low, high].map((end) =>
      shape("line", { class: `line-${side}`, x1: x(end), x2: x(end), y1: 34, y2: 50, "stroke-width": 2 })),
    shape("line", { class: "half", x1: x(0.5), x2: x(0.5), y1: 27, y2: 56 }),
    shape("circle", { class: `dot fill-${side}`, cx: x(rate), cy: 42, r: 7 }),
    text(Math.min(Math.max(x(rate), LEFT + 24), RIGHT - 24), 21, "middle", percent(rate),
      { class: "strong" }),
    ...ticks,
  );
}

// Counts of the differences: BINS on either side of zero up to `limit`, and ties by themselves.
function histogram(differences) {
  const sizes = differences.map(Math.abs).sort((p, q) => p - q);
  const limit = sizes[Math.min(sizes.length - 1, Math.floor(0.99 * sizes.length))] || 1;
  const counts = { a: new Array(BINS).fill(0), b: new Array(BINS).fill(0), tie: 0 };
  for (const difference of differences) {
    if (difference === 0) counts.tie += 1;
    else {
      const bin = Math.min(BINS - 1, Math.floor((Math.abs(difference) / limit) * BINS));
      counts[difference > 0 ? SIDE_A : SIDE_B][bin] += 1;
    }
  }
  return { limit, counts };
}

function differenceChart(result, differences) {
  const { limit, counts } = histogram(differences);
  const middle = WIDTH / 2;
  const half = 5; // of the ties' bar
  const step = (RIGHT - middle - half) / BINS;
  const base = 112;
  const top = 14;
  const most = Math.max(1, counts.tie, ...counts.a, ...counts.b);
  const places = decimals(3, limit);
  const bar = (side, x, width, count, words) => {
    const height = count ? Math.max(1.5, ((base - top) * count) / most) : 0;
    return shape(
      "rect",
      { class: `fill-${side}`, x, y: base - height, width, height, rx: 1 },
      shape("title", {}, words),
    );
  };
  const range = (i) =>
    i === BINS - 1
      ? `${fixed((i * limit) / BINS, places)} or more`
      : `${fixed((i * limit) / BINS, places)} to ${fixed(((i + 1) * limit) / BINS, places)}`;
  const bars = [bar(TIE, middle - half + 1, 2 * half - 2, counts.tie, `${counts.tie} ties`)];
  for (let i = 0; i < BINS; i += 1) {
    const [a, b] = [counts.a[i], counts.b[i]];
    bars.push(bar(SIDE_A, middle + half + i * step + 0.75, step - 1.5, a, `A better by ${range(i)}: ${a} pairs`));
    bars.push(bar(SIDE_B, middle - half - (i + 1) * step + 0.75, step - 1.5, b, `B better by ${range(i)}: ${b} pairs`));
  }
  const clamp = (value) => Math.min(1, Math.max(-1, value / limit));
  const x = (value) => middle + clamp(value) * (RIGHT - middle);
  const mean = x(result.mean_diff);
  const described =
    `Differences of the scores: A better in ${result.wins_a}, B better in ${result.wins_b}, tied in ` +
    `${result.ties} pairs; mean difference ${signed(result.mean_diff, places)}.`;
  return shape(
    "svg",
    { viewBox: `0 0 ${WIDTH} 146`, role: "img", "aria-label": described },
    ...bars,
    shape("line", { class: "axis", x1: LEFT, x2: RIGHT, y1: base + 0.5, y2: base + 0.5 }),
    shape("path", { class: "ink", d: `M${mean} ${base + 2} l5 8 h-10 z` },
      shape("title", {}, `mean difference ${signed(result.mean_diff, places)}`)),
    text(LEFT, 10, "start", `◂ B better in ${result.wins_b}`, { class: "fill-b" }),
    text(RIGHT, 10, "end", `A better in ${result.wins_a} ▸`, { class: "fill-a" }),
    text(LEFT, base + 24, "start", `−${limit.toFixed(places)}`),
    text(middle, base + 24, "middle", result.ties ? `${result.ties} tied` : "0"),
    text(RIGHT, base + 24, "end", `+${limit.toFixed(places)}`),
  );
}

function showCharts(comparison) {
  const [a, b] = [data.models[comparison.a], data.models[comparison.b]];
  const cards = data.metrics.map(({ name, label }) => {
    const result = comparison.results[name];
    const differences = comparison.rows_a.map(
      (row, i) => a.scores[name][row] - b.scores[name][comparison.rows_b[i]]);
    return element(
      "figure", { class: "card" },
      element("figcaption", {}, label, verdict(result)),
      winRateChart(result),
      differenceChart(result, differences),
    );
  });
  byId("charts").replaceChildren(...cards);
}

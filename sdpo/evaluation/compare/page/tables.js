// The data, small helpers, and the tables. Whatever comes from the data enters the page through
// textContent or an attribute, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

const SIDE_A = "a";
const SIDE_B = "b";
const TIE = "tie";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const element = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);

const shape = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const percent = (rate, places = 1) => `${(100 * rate).toFixed(places)}%`;

// Decimals for `digits` significant digits of the largest of the values.
function decimals(digits, ...values) {
  const size = Math.max(...values.map(Math.abs));
  if (!(size > 0)) return 2;
  return Math.min(8, Math.max(1, digits - 1 - Math.floor(Math.log10(size))));
}

const fixed = (value, places) => value.toFixed(places).replace("-", "−");

function signed(value, places) {
  const text = fixed(value, places);
  return value > 0 ? `+${text}` : text;
}

function pValue(p) {
  if (p < 1e-4) return "< 0.0001";
  return p.toFixed(p < 0.01 ? 4 : 3);
}

const tag = (side) =>
  element("span", { class: `tag of-${side}` }, side === TIE ? "=" : side.toUpperCase());

// Which side wins more often than chance explains, whatever ties count.
function verdictOf(result) {
  if (result.sign_test_p >= 0.05) return TIE;
  return result.wins_a > result.wins_b ? SIDE_A : SIDE_B;
}

function verdict(result) {
  const side = verdictOf(result);
  const words = { a: "A ahead", b: "B ahead", tie: "undecided" };
  return element("span", { class: `verdict of-${side}` }, words[side]);
}

// A win rate as number, interval and a strip from 0 to 100%, marked at 50%.
function rateCell(result) {
  const [low, high] = [result.ci95_low, result.ci95_high];
  const side = verdictOf(result);
  const x = (rate) => 6 + 120 * rate;
  return element(
    "td",
    {},
    element("strong", {}, percent(result.win_rate_a_over_b)),
    element("span", { class: "interval" }, `${percent(low)} to ${percent(high)}`),
    shape(
      "svg",
      { viewBox: "0 0 132 14", "aria-hidden": "true" },
      shape("rect", { class: "track", x: 6, y: 5, width: 120, height: 4, rx: 2 }),
      shape("rect", {
        class: `fill-${side}`, x: x(low), y: 5, width: Math.max(2, x(high) - x(low)), height: 4,
        rx: 2, "fill-opacity": 0.55,
      }),
      shape("line", { class: "half", x1: x(0.5), x2: x(0.5), y1: 0, y2: 14 }),
      shape("circle", { class: `dot fill-${side}`, cx: x(result.win_rate_a_over_b), cy: 7, r: 4.5 }),
    ),
  );
}

function table(node, head, rows) {
  const cells = head.map((children) => element("th", { scope: "col" }, ...[children].flat()));
  node.replaceChildren(
    element("thead", {}, element("tr", {}, ...cells)),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row))),
  );
}

const rowHead = (text) => element("th", { scope: "row" }, text);
const cell = (...children) => element("td", {}, ...children);

function showSummary(comparison) {
  const rows = data.metrics.map(({ name, label }) => {
    const r = comparison.results[name];
    const places = decimals(3, r.mean_diff_ci95_low, r.mean_diff_ci95_high);
    const [low, high] = [r.mean_diff_ci95_low, r.mean_diff_ci95_high];
    return [
      rowHead(label),
      rateCell(r),
      cell(`${r.wins_a} / ${r.ties} / ${r.wins_b}`),
      cell(pValue(r.sign_test_p)),
      cell(fixed(r.mean_a, places)),
      cell(fixed(r.mean_b, places)),
      cell(
        element("span", {}, signed(r.mean_diff, places)),
        element("span", { class: "interval" }, `${signed(low, places)} to ${signed(high, places)}`),
      ),
      cell(verdict(r)),
    ];
  });
  const head = [
    "Metric", ["Win rate of ", tag(SIDE_A)], "Wins / ties / losses", "Sign test p",
    ["Mean ", tag(SIDE_A)], ["Mean ", tag(SIDE_B)], [tag(SIDE_A), " − ", tag(SIDE_B)], "Verdict",
  ];
  table(byId("summary"), head, rows);
  const meanings = data.metrics.filter((m) => m.meaning).map((m) => ` ${m.label}: ${m.meaning}.`);
  byId("summary-note").textContent =
    `${comparison.rows_a.length} pairs. Ranges are 95% intervals. “Ahead” means a sign test p below ` +
    `0.05, without correction for the number of metrics.${meanings.join("")}`;
}

function showCategories(comparison) {
  const names = Object.keys(comparison.categories[data.metrics[0].name]);
  byId("categories-section").hidden = names.length === 0;
  const rows = names.map((category) => {
    const results = data.metrics.map(({ name }) => comparison.categories[name][category]);
    return [rowHead(category), ...results.map(rateCell), cell(String(results[0].total_pairs))];
  });
  table(byId("categories"), ["Category", ...data.metrics.map((m) => m.label), "Pairs"], rows);
}

function leftover(model, rows) {
  const items = rows.map((row) => element("li", { value: row, dir: "auto" }, model.prompts[row]));
  const what = `${rows.length} of ${model.prompts.length} images have no partner`;
  return element(
    "details",
    {},
    element("summary", {}, element("strong", {}, model.label), `: ${what}`),
    element("p", { class: "muted small" }, "Numbered by the row of the manifest, from 0."),
    element("ol", {}, ...items),
  );
}

function showLeftovers(comparison) {
  const sides = [[comparison.a, comparison.unmatched_a], [comparison.b, comparison.unmatched_b]];
  const parts = sides
    .filter(([, rows]) => rows.length)
    .map(([model, rows]) => leftover(data.models[model], rows));
  if (comparison.differing.length) {
    const of = `${comparison.differing.length} of ${comparison.rows_a.length}`;
    parts.push(element("p", {}, `${of} pairs, made by index, have different prompts.`));
  }
  byId("leftovers-section").hidden = parts.length === 0;
  byId("leftovers").replaceChildren(...parts);
}

// One table a metric; `choose(i, j)` is called with the models of the cell that was pressed.
function showMatrices(choose) {
  byId("matrix-section").hidden = data.models.length < 3;
  if (data.models.length < 3) return;
  const cards = data.matrices.map((matrix) => {
    const node = element("table");
    const rows = matrix.models.map((label, i) => [
      rowHead(label),
      ...matrix.win_rate[i].map((rate, j) => {
        if (rate === null) return cell("–");
        const [low, high] = [matrix.ci95_low[i][j], matrix.ci95_high[i][j]];
        const button = element(
          "button",
          {
            type: "button",
            class: `cell side-${rate >= 0.5 ? SIDE_A : SIDE_B}`,
            "data-pair": `${i}-${j}`,
            title: `${label} over ${matrix.models[j]}: ${percent(low)} to ${percent(high)}`,
          },
          percent(rate),
          element("span", { class: "interval" }, `${(100 * low).toFixed(0)} to ${percent(high, 0)}`),
        );
        button.style.setProperty("--strength", `${Math.round(70 * Math.abs(rate - 0.5) * 2)}%`);
        button.addEventListener("click", () => choose(i, j));
        return cell(button);
      }),
    ]);
    table(node, ["", ...matrix.models], rows);
    return element(
      "div", { class: "card" }, element("h3", {}, matrix.metric),
      element("div", { class: "matrix" }, node),
    );
  });
  byId("matrices").replaceChildren(...cards);
}

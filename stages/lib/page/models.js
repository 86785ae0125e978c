"use strict";
// What the models say, and what was measured.

function drawModels() {
  const section = find("#models");
  const part = (name) => find(`[data-part=${name}]`, section);
  select(find(".controls", section), "Cell", data.cells.map(cellName), (index) => {
    const cell = data.cells[index];
    for (const name of ["loss", "rate", "errors", "pairs"]) part(name).replaceChildren();
    for (const [scale, models] of Object.entries(cell.scales)) {
      lossOf(part("loss"), scale, models);
      rateOf(part("rate"), scale, models);
    }
    part("errors").append(errorTable(cell));
    for (const [quantity, found] of Object.entries(cell.importance)) {
      scales.forEach((scale, s) => pairsOf(part("pairs"), `${capital(quantity)}, scale ${scale}`, found, s));
    }
  });
  if (Object.keys(data.additivity).length) drawAdditivity(find(".studied", section));
}

const MANY = "fill: var(--accent)"; // half transparent, a colour of the static figures would be lost at night
const r2 = (value) => `r² ${fixed(value, 2)}`;

function doubts(flags) {
  const text = flags.join(", ").replaceAll("_", " ");
  return text ? [" ", html("span", { class: "doubt" }, text)] : [];
}

// model: [[x, y]] of a curve; points: {x, y, lines}, what was measured.
function fitted(parent, title, x, y, model, points, note) {
  const draw = (width, height) => {
    const plot = frame(width, height, x, y);
    plot.curve(model, stroke(colours.fit));
    const placed = points.map((p) => ({ x: plot.x(p.x), y: plot.y(p.y), series: title, lines: p.lines }));
    plot.root.append(...placed.map((p) => dot(p.x, p.y, colours.measured)));
    return explore(plot.root, `${y.label}, ${title}`, placed);
  };
  chart(parent, title, 180, draw, { note });
}

function lossOf(parent, scale, { rate, drop, power }) {
  const law = (r) => power.weight * power.alpha * r ** power.beta;
  const [low, high] = [Math.min(...rate), Math.max(...rate)];
  const model = Array.from({ length: 41 }, (_, i) => low * (high / low) ** (i / 40)).map((r) => [r, law(r)]);
  const points = rate.map((r, i) => {
    const values = `drop ${fixed(drop[i], 4)}, law ${fixed(law(r), 4)}`;
    return { x: r, y: drop[i], lines: [`scale ${scale}, ${qualities[i]}`, `${plain(r)} bits per plane pixel`, values] };
  });
  const x = { ...logRange(rate), label: "bits per plane pixel" };
  const y = { ...range([...drop, ...model.map((pair) => pair[1]), 0]), label: "drop of the image's AP" };
  const note = [`held-out ${r2(power.r2)}`, ...doubts(power.flags)];
  fitted(parent, `Scale ${scale}`, x, y, model, points, note);
}

function rateOf(parent, scale, { rate, rate_phi: line }) {
  const last = rate.length - 1;
  const model = [0, last].map((phi) => [phi, line.a * phi + line.b]);
  const points = rate.map((r, phi) => {
    const values = `${plain(r)} bits per plane pixel, model ${plain(line.a * phi + line.b)}`;
    return { x: phi, y: r, lines: [`scale ${scale}, phi ${phi}`, values] };
  });
  const x = { low: -0.3, high: last + 0.3, label: "phi" };
  const y = { ...range([...rate, ...model.map((pair) => pair[1])]), label: "bits per plane pixel" };
  const note = [`in-sample ${r2(line.r2)}`, ...doubts(line.flags)];
  fitted(parent, `Scale ${scale}`, x, y, model, points, note);
}

function pairsOf(parent, title, found, s) {
  const [predicted, measured] = ["predicted", "measured"].map((who) => found.pairs[who].map((values) => values[s]));
  const axis = { low: 0, high: 1.05 * (quantile([...predicted, ...measured], 0.98) || 1) };
  const draw = (width, height) => {
    const plot = frame(width, height, { ...axis, label: "predicted" }, { ...axis, label: "measured" });
    plot.curve(
      [
        [axis.low, axis.low],
        [axis.high, axis.high],
      ],
      stroke(colours.muted, DASHED),
    );
    const style = `${MANY}; opacity: 0.75`;
    const at = (i) => ({ cx: plot.x(predicted[i]), cy: plot.y(measured[i]), r: 2.5, style });
    plot.root.append(...predicted.map((_, i) => svg("circle", at(i))));
    return explore(plot.root, `${title}: measured over predicted, ${predicted.length} images`, []);
  };
  chart(parent, title, 180, draw, { note: r2(found.r2[s]) });
}

function errorTable(cell) {
  const models = Object.keys(cell.scales[scales[0]].rivals);
  const titles = models.map((name) => `loss, ${name.replaceAll("_", " ")}: r²`);
  const rows = Object.entries(cell.scales).map(([scale, { power, rivals, bits_error: error }]) => [
    scale,
    fixed(power.r2, 2),
    fixed(power.rmse, 3),
    ...models.map((name) => fixed(rivals[name], 2)),
    percent(sum(error) / error.length),
  ]);
  const headers = ["scale", "drop: r²", "drop: rmse", ...titles, "bits from one precoding: error"];
  return tableOf(headers, rows, "Held-out errors of the models");
}

function drawAdditivity(parent) {
  const grid = html("div", { class: "grid small" });
  const controls = html("div", { class: "controls" });
  const text =
    "Every allocation here minimises a sum over the scales. Random choices of qualities: their joint loss over the " +
    "sum of the losses of the single scales, in objects. The stronger the colour, the more choices; points are the " +
    "means of each tenth; on the dashed line the losses add up.";
  parent.append(html("h3", {}, "Do the losses of the scales add up?"), html("p", {}, text), controls, grid);
  select(controls, "Study", Object.keys(data.additivity), (index) => {
    grid.replaceChildren();
    for (const part of Object.values(data.additivity)[index]) additivityOf(grid, part);
  });
}

function additivityOf(parent, { name, limits, side, squares, tenths, ...fit }) {
  const [x, y] = limits.map(([low, high]) => ({ low, high }));
  const most = Math.log(1 + Math.max(...squares.map((square) => square[2])));
  const draw = (width, height) => {
    const plot = frame(width, height, { ...x, label: "sum, objects" }, { ...y, label: "joint, objects" });
    for (const [left, below, count] of squares) {
      const [x0, y0] = [plot.x(left), plot.y(below + side[1])];
      const size = { width: plot.x(left + side[0]) - x0, height: plot.y(below) - y0 };
      const opacity = 0.15 + (0.75 * Math.log(1 + count)) / most;
      plot.root.append(svg("rect", { x: x0, y: y0, ...size, style: `${MANY}; opacity: ${opacity}` }));
    }
    const [low, high] = [Math.max(x.low, y.low), Math.min(x.high, y.high)];
    plot.curve(
      [
        [low, low],
        [high, high],
      ],
      stroke(colours.muted, DASHED),
    );
    plot.curve(tenths, stroke(colours.fit));
    const points = tenths.map(([total, joint], i) => {
      const lines = [`tenth ${i + 1}`, `sum ${fixed(total, 2)}, joint ${fixed(joint, 2)} objects`];
      return { x: plot.x(total), y: plot.y(joint), series: name, lines };
    });
    plot.root.append(...points.map((p) => dot(p.x, p.y, colours.fit)));
    return explore(plot.root, `Additivity, ${name}`, points);
  };
  const note = `${whole(fit.tuples)} choices, slope ${fixed(fit.slope, 2)}, in an image ${r2(fit.r2_within)}`;
  chart(parent, capital(name), 220, draw, { note });
}

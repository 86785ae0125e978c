"use strict";
// The sections of the page, from top to bottom.

// ---------------------------------------------------------------- savings

function drawSavings() {
  const section = find("#savings");
  find(".headline", section).append(...data.heroes.toReversed().map((name) => html("span", {}, headline(name))));
  for (const task of new Set(data.cells.map((cell) => cell.task))) savingsOf(find(".grid", section), task);
  const named = Object.keys(methods).filter((name) => data.cells.some((cell) => savingOf(cell, name)));
  const text = (saving) => (saving ? `${interval(saving)}${saving.doubt ? " ?" : ""}` : "");
  const rows = named.map((name) => [shown(name), ...data.cells.map((cell) => text(savingOf(cell, name)))]);
  find("details", section).append(tableOf(["method", ...data.cells.map(cellName)], rows));
}

const savingOf = (cell, name) => cell.savings.find((saving) => saving.method === name);
const interval = ({ value, low, high }) => `${fixed(value, 1)} [${fixed(low, 1)}, ${fixed(high, 1)}]`;

function headline(name) {
  const values = data.cells.map((cell) => savingOf(cell, name)?.value ?? null).filter((value) => value !== null);
  const ends = values.length ? `${signed(Math.min(...values))} to ${signed(Math.max(...values))} %` : "no BD-rate";
  return `${name}: ${ends} bits against ${data.anchor}, in ${values.length} of ${data.cells.length} cells`;
}

// All codecs of a task, one below the other; the axis is that of all tasks.
function savingsOf(parent, task) {
  const rows = data.cells.filter((cell) => cell.task === task).flatMap(savingRows);
  const ends = data.cells.flatMap(savingRows).flatMap(({ value = 0, low = null, high = null }) => [value, low, high]);
  const x = { ...range([...ends, 0]), label: "BD-rate, %" };
  const y = { low: rows.length - 0.4, high: -0.6, ticks: [] };
  const draw = (width, height) => {
    const plot = frame(width, height, x, y, { left: 150, right: 56 });
    const points = [];
    plot.root.append(upright(plot.x(0), plot.y(y.low), plot.y(y.high)));
    rows.forEach((row, i) => {
      const middle = plot.y(i);
      const text = (at, content, style = "") => plot.root.append(svg("text", { x: at, y: middle + 4, style }, content));
      if (row.head) return text(0, row.head, "font-weight: 600");
      text(10, shown(row.method));
      text(width - 48, fixed(row.value, 1) + (row.doubt ? " ?" : ""));
      if (row.value === null) return;
      const at = plot.x(row.value);
      if (row.low !== null)
        plot.curve(
          [
            [row.low, i],
            [row.high, i],
          ],
          stroke(methods[row.method].colour),
        );
      plot.root.append(methods[row.method] ? marker(row.method, at, middle) : dot(at, middle, colours.measured));
      const about = [`${shown(row.method)}, ${row.series}`, `BD-rate ${interval(row)} %`];
      points.push({
        x: at,
        y: middle,
        series: row.series,
        lines: row.doubt ? [...about, `Doubtful: ${row.doubt}`] : about,
      });
    });
    return explore(plot.root, `Savings in ${task}`, points);
  };
  chart(parent, capital(task), rows.length * 19 + 46, draw);
}

function savingRows(cell) {
  const series = cell.codec.toUpperCase();
  const reported = Object.entries(cell.references).map(([method, value]) => ({ method, value, low: null, high: null }));
  return [
    { head: `${series}, ${cell.accuracy_name} ${fixed(cell.uncoded, 3)} uncoded` },
    ...[...cell.savings, ...reported].map((row) => ({ ...row, series })),
  ];
}

// ---------------------------------------------------------------- rate and accuracy

function drawCurves() {
  const section = find("#curves");
  const named = Object.keys(methods).filter((name) => data.cells.some((cell) => cell.curves[name]));
  const visible = new Set(named.filter((name) => !methods[name].sees_labels || name.startsWith("oracle")));
  const redraws = data.cells.map((cell) => curvesOf(find(".grid", section), cell, visible));
  for (const name of named) {
    const change = (event) => {
      if (event.target.checked) visible.add(name);
      else visible.delete(name);
      for (const redraw of redraws) redraw();
    };
    const box = html("input", { type: "checkbox", value: name, checked: visible.has(name), change });
    const line = svg("path", { d: "M0,7H30", style: methodLine(name) });
    find(".switches", section).append(html("label", {}, box, sample([line, marker(name, 15, 7)]), shown(name)));
  }
}

function curvesOf(parent, cell, visible) {
  const all = Object.values(cell.curves);
  const x = { ...logRange(all.flatMap((c) => c.bits)), label: "bits per image" };
  const heights = range([...all.flatMap((c) => [...c.accuracy, ...c.low, ...c.high]), cell.uncoded]);
  const y = { ...heights, label: `${cell.accuracy_name} on ${cell.split}` };
  const draw = (width, height) => {
    const plot = frame(width, height, x, y);
    const points = [];
    const [bands, lines] = [svg("g"), svg("g")];
    const uncoded = { x: plot.x(x.low) + 4, y: plot.y(cell.uncoded) + 14, class: "soft" };
    plot.root.append(bands, lines, level(plot.x(x.low), plot.x(x.high), plot.y(cell.uncoded), DASHED));
    plot.root.append(svg("text", uncoded, `uncoded ${fixed(cell.uncoded, 3)}`));
    for (const [name, c] of Object.entries(cell.curves)) {
      if (!visible.has(name)) continue;
      const at = (values) => c.bits.map((bits, i) => [plot.x(bits), plot.y(values[i])]);
      const [drawn, colour] = [at(c.accuracy), methods[name].colour];
      bands.append(curve([...at(c.low), ...at(c.high).reverse()], { style: `fill: ${colour}; opacity: 0.1` }));
      const markers = drawn.map(([px, py]) => marker(name, px, py));
      lines.append(svg("g", { "data-method": name }, curve(drawn, { style: methodLine(name) }), ...markers));
      points.push(...drawn.map(([px, py], i) => ({ x: px, y: py, series: name, lines: pointLines(cell, name, c, i) })));
    }
    return explore(plot.root, `${cellName(cell)}: accuracy over rate`, points);
  };
  const printed = html("a", { href: `figures/rd_${cell.task}_${cell.codec}.svg` }, "for print");
  return chart(parent, cellName(cell), 290, draw, { note: [`${cell.n_images} images; `, printed] });
}

function pointLines(cell, name, c, i) {
  return [
    `${shown(name)}, point ${c.point[i]}`,
    `${whole(c.bits[i])} bits per image, ${plain(c.bpp[i])} bpp`,
    `${cell.accuracy_name} ${fixed(c.accuracy[i], 3)} [${fixed(c.low[i], 3)}, ${fixed(c.high[i], 3)}]`,
  ];
}

// ---------------------------------------------------------------- importance

function drawImportance() {
  const section = find("#importance");
  const grid = find(".grid", section);
  const codecs = [...new Set(data.cells.map((cell) => cell.codec))];
  const names = codecs.map((codec) => codec.toUpperCase());
  select(find(".controls", section), "Codec", names, (index) => {
    grid.replaceChildren();
    for (const quantity of Object.keys(QUANTITIES)) {
      for (const cell of data.cells.filter((c) => c.codec === codecs[index])) importanceOf(grid, cell, quantity);
    }
  });
  if (Object.keys(data.sizes).length) drawSizes(find(".studied", section));
}

function importanceOf(parent, cell, quantity) {
  const series = Object.entries(cell.importance[quantity].means).map(([name, { mean, std }]) => {
    const low = mean.map((value, i) => Math.max(value - std[i], 0));
    return { name, colour: colours[name], values: mean, low, high: mean.map((value, i) => value + std[i]) };
  });
  const highest = quantity === "sensitivity" ? SENSITIVE : Infinity;
  const labels = { xLabel: "scale", yLabel: "mean ± standard deviation" };
  bars(parent, `${capital(cell.task)}: ${QUANTITIES[quantity]}`, scales, series, { ...labels, highest });
}

function drawSizes(parent) {
  const grid = html("div", { class: "grid" });
  const controls = html("div", { class: "controls" });
  const text =
    "Thirds of the images of test by the median area of their objects; BD-rates are over these images alone.";
  parent.append(html("h3", {}, "By the size of the objects"), html("p", {}, text), controls, grid);
  select(controls, "Study", Object.keys(data.sizes), (index) => {
    grid.replaceChildren();
    sizesOf(grid, Object.values(data.sizes)[index]);
  });
}

// rows: of sizes.csv
function sizesOf(parent, rows) {
  const sizes = [...new Set(rows.map((row) => row.size))];
  const value = (size, quantity, name, column = "value") =>
    rows.find((row) => row.size === size && row.quantity === quantity && row.name === name)?.[column] ?? null;
  const compared = new Set(rows.filter((row) => row.quantity === "bd_rate").map((row) => row.name));
  const saved = [...compared].map((name) => {
    const of = (column) => sizes.map((size) => value(size, "bd_rate", name, column));
    const colour = methods[name]?.colour ?? colours.muted;
    return { name: shown(name), colour, values: of("value"), low: of("ci_low"), high: of("ci_high") };
  });
  const title = `BD-rate against ${data.anchor}`;
  bars(parent, title, sizes, saved, { xLabel: "objects", yLabel: "%", digits: 1, unit: " %" });
  const titles = { weight: "Measured weight", sensitivity: "Predicted sensitivity" };
  titles.measured_sensitivity = "Measured sensitivity";
  for (const [quantity, name] of Object.entries(titles)) {
    const of = (size) => scales.map((scale) => value(size, quantity, scale));
    const shades = sizes.map((size, i) => ({ name: size, colour: data.shades[i], values: of(size) }));
    const highest = quantity === "weight" ? Infinity : SENSITIVE;
    bars(parent, name, scales, shades, { xLabel: "scale", yLabel: "mean", highest });
  }
}

// ---------------------------------------------------------------- models

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
    const style = `fill: ${colours.label}; opacity: 0.6`;
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
  return table(["scale", "drop: r²", "drop: rmse", ...titles, "bits from one precoding: error"], rows);
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
      plot.root.append(svg("rect", { x: x0, y: y0, ...size, style: `fill: ${colours.label}; opacity: ${opacity}` }));
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

// ---------------------------------------------------------------- where the bits go

const PARTS = ["latent", "hyper-latent", "header", "range"];

function drawLedger() {
  const section = find("#ledger");
  let quality = 0;
  const grid = find(".grid", section);
  const redraws = Object.entries(data.ledgers).map(([name, ledger]) => ledgerOf(grid, name, () => ledger[quality]));
  slider(find(".controls", section), "Quality", qualities, (index) => {
    quality = index;
    for (const redraw of redraws) redraw();
  });
}

// ledger() -> bits of each scale and part, at the quality that is shown
function ledgerOf(parent, name, ledger) {
  const keys = PARTS.map((part, k) => ({ name: part, sample: swatch(data.palette[k]) }));
  const draw = (width, height) => {
    const rows = scales.map((scale, s) => [`scale ${scale}`, ledger()[s]]);
    rows.push(["frame", [0, 0, data.frame_bits, 0]]);
    rows.push(["image", PARTS.map((_, k) => sum(rows.map(([, bits]) => bits[k])))]);
    const total = sum(rows.at(-1)[1]);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}` });
    const [left, right] = [72, width - 130];
    const points = [];
    rows.forEach(([row, bits], i) => {
      const y = i * 28 + 6;
      const own = sum(bits);
      root.append(svg("text", { x: 0, y: y + 15 }, row));
      root.append(svg("text", { x: right + 8, y: y + 15 }, `${whole(own)} bits, ${percent(own / total)}`));
      let x = left;
      bits.forEach((part, k) => {
        if (!part) return;
        const long = ((right - left) * part) / own;
        root.append(svg("rect", { x, y, width: long, height: 22, style: `fill: ${data.palette[k]}` }));
        const shares = `${whole(part)} bits, ${percent(part / own)} of the row, ${percent(part / total)} of the image`;
        points.push({ x: x + long / 2, y: y + 11, series: row, lines: [`${row}, ${PARTS[k]}`, shares] });
        x += long;
      });
    });
    return explore(root, `Bits of ${name}`, points);
  };
  return chart(parent, name, 7 * 28 + 10, draw, { keys });
}

// ---------------------------------------------------------------- cost and provenance

function drawCosts() {
  const place = find("#costs .measured");
  if (data.costs === null) return place.append(html("p", {}, "Speed and memory of the codecs: not measured."));
  const rows = data.costs.map(({ codec, size, device, threads, planes, seconds, peak_mib: memory = null, note }) => {
    if (!seconds) return [codec, size, device, "", "", note, note, note];
    const numbers = [fixed(seconds.encode, 3), fixed(seconds.decode, 3), fixed(memory, 0)];
    return [codec, size, device, whole(threads), whole(planes), ...numbers];
  });
  const headers = ["codec", "size", "device", "threads", "planes", "encode, s", "decode, s", "peak memory, MiB"];
  place.append(html("p", {}, `The codecs on planes of features, on ${data.costs[0].machine}:`), tableOf(headers, rows));
}

function drawProvenance() {
  const { params, versions, machine, hashes } = data.provenance;
  const known = Object.entries(hashes);
  const folded = (title, inner) => html("details", {}, html("summary", {}, title), inner);
  find("#provenance .tables").append(
    tableOf(["machine", ""], Object.entries(machine)),
    folded("Versions", tableOf(["package", "version"], Object.entries(versions))),
    folded("Params, with the seeds", html("pre", { tabindex: 0 }, params)),
    folded(
      "Hashes of what this page was made from (MD5, by DVC)",
      known.length ? tableOf(["file or folder", "hash"], known) : html("p", {}, "Not known: there was no dvc.lock."),
    ),
  );
}

drawSavings();
drawCurves();
drawImportance();
drawExamples();
drawModels();
drawLedger();
drawCosts();
drawProvenance();

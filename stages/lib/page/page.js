"use strict";
// The sections of the page, from top to bottom.

// ---------------------------------------------------------------- savings

function drawSavings() {
  const section = find("#savings");
  const heroes = Object.entries(data.heroes).toReversed();
  find(".headline", section).append(...heroes.map(([hero, fixed]) => html("span", {}, headline(hero, fixed))));
  find(".numbers", section).append(
    headTable("savings", `BD-rate against ${data.anchor}, %`, [...new Set(heroes.flat())]),
    headTable("high", `The same ${kept()}`, [...new Set(heroes.flat())]),
  );
  for (const task of new Set(data.cells.map((cell) => cell.task))) savingsOf(find(".grid", section), task);
}

const interval = ({ value, low, high }) => `${fixed(value, 1)} [${fixed(low, 1)}, ${fixed(high, 1)}]`;
const kept = () => `where at least ${whole(100 * data.high)} % of the uncoded accuracy is kept`;

// Both: part is that of a cell, savings or high.
const savingOf = (cell, part, name) => cell[part].find(({ method }) => method === name) ?? null;

function headTable(part, title, names) {
  const text = (saving) => (saving ? `${interval(saving)}${saving.doubt ? " ?" : ""}` : "");
  const rows = data.cells.map((cell) => [cellName(cell), ...names.map((name) => text(savingOf(cell, part, name)))]);
  return html("figure", {}, html("figcaption", {}, title), tableOf(["cell", ...names.map(shown)], rows, title));
}

// hero: a method; fixed: what it has to beat, the best fixed vector of the same qualities
function headline(hero, fixed) {
  const values = (part, name) => data.cells.flatMap((cell) => savingOf(cell, part, name)?.value ?? []);
  const ends = (found) => `${signed(Math.min(...found))} to ${signed(Math.max(...found))} %`;
  const saved = (part, name) => (values(part, name).length ? ends(values(part, name)) : "no BD-rate");
  const beside = (part) => `(${fixed} ${saved(part, fixed)})`;
  const all = `${saved("savings", hero)} bits against ${data.anchor} ${beside("savings")}`;
  const count = `${values("savings", hero).length} of ${data.cells.length} cells`;
  return `${hero}: ${all}, in ${count}; ${saved("high", hero)} ${beside("high")} ${kept()}`;
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

// ---------------------------------------------------------------- cost

function drawCosts() {
  const place = find("#costs .measured");
  if (data.costs === null) return place.append(html("p", {}, "Not measured."));
  const { machine, online, growth, codecs } = data.costs;
  const code = html("code", {}, "python -m stages.benchmark");
  const part = (title, found, text, draw) => {
    place.append(html("h3", {}, title), html("p", {}, found ? text : "Not measured."), found ? draw(found) : "");
  };
  place.append(html("p", {}, "By ", code, `, on ${machine}.`));
  part("One image", online, ONLINE, costsOnline);
  part("Stages", growth, GROWTH, costsOfStages);
  part("Codecs", codecs, "The planes of a batch of images, coded and decoded.", costsOfCodecs);
}

const ONLINE =
  "Seconds of the sender's and the receiver's steps on one thread, medians over images of test. uniform is plain " +
  "coding, at the quality of the precoding; what the others take more is the price of the allocation. Where a price " +
  "of bits is given, qualities follow from one precoding; where the bits are given, candidates are coded until the " +
  "size fits. Writing makes the container and its checksum; memory is the peak of the process.";
const GROWTH =
  "Stages that work through images, in one process. Seconds are those of the clock and of the CPU with the most " +
  "images; an image's are what the CPU took more than with the fewest images, over the images more.";
const SENDER = ["backbone", "precoding", "MFIP", "allocation", "coding", "writing"];
const RECEIVER = ["decoding", "heads"];

function costsOnline(cases) {
  const rows = cases.flatMap(({ cell, device, note, sender, receiver }) => {
    if (note) return [[`${cell}, ${device}: ${note}`]];
    const total = (steps) => sum(Object.values(steps));
    const plainly = total(sender.seconds[data.anchor]);
    const numbers = (steps, names) => names.map((name) => (name in steps ? fixed(steps[name], 3) : ""));
    return Object.entries(sender.seconds).map(([way, steps]) => [
      `${cell}, ${device}: ${way}`,
      ...[...numbers(steps, SENDER), fixed(total(steps), 3), fixed(total(steps) / plainly, 2)],
      ...[...numbers(receiver.seconds[way], RECEIVER), fixed(total(receiver.seconds[way]), 3)],
      ...[whole(sender.peak_mib), whole(receiver.peak_mib)],
    ]);
  });
  const totals = ["sender, s", `to ${data.anchor}`, ...RECEIVER, "receiver, s"];
  const headers = ["cell, device: qualities", ...SENDER, ...totals, "sender, MiB", "receiver, MiB"];
  return tableOf(headers, rows, "Cost of one image");
}

function costsOfStages({ times, before_mib: before, stages }) {
  const rows = stages.map(({ stage, items, seconds, cpu_seconds: cpu, peak_mib: peak }) => {
    const last = items.length - 1;
    const ofImage = (cpu[last] - cpu[0]) / (items[last] - items[0]);
    const taken = [whole(items[last]), fixed(seconds[last], 1), fixed(cpu[last], 1), fixed(ofImage, 3)];
    return [stage, ...taken, whole(peak[last]), fixed(peak[last] / peak[0], 2)];
  });
  rows.push(["a process that does nothing", "", "", "", "", whole(before), ""]);
  const headers = ["stage", "images", "seconds", "CPU seconds", "CPU seconds an image", "peak memory, MiB"];
  return tableOf([...headers, `peak, to ${times[0]}/${times.at(-1)} of the images`], rows, "Cost of the stages");
}

function costsOfCodecs(cases) {
  const name = ({ codec, size, device }) => `${codec}, ${size}, ${device}`;
  const rows = cases
    .filter((of) => of.seconds)
    .map((of) => [
      ...[name(of), whole(of.threads), whole(of.planes)],
      ...[fixed(of.seconds.encode, 3), fixed(of.seconds.decode, 3), fixed(of.peak_mib, 0)],
    ]);
  const told = (note) => `${capital(note)}: ${cases.filter((of) => of.note === note).map(name).join("; ")}.`;
  const notes = [...new Set(cases.flatMap((of) => of.note ?? []))].map((note) => html("p", {}, told(note)));
  const headers = ["codec, size, device", "threads", "planes", "encode, s", "decode, s", "peak memory, MiB"];
  return html("div", {}, tableOf(headers, rows, "Cost of the codecs"), ...notes);
}

// ---------------------------------------------------------------- tables and provenance

function drawTables() {
  const folded = data.tables.map(({ title, headers, rows, notes, texts }) => {
    const below = notes.map((note) => html("p", {}, note));
    return html("details", {}, html("summary", {}, title), tableOf(headers, rows, title, texts), ...below);
  });
  find("#tables .tables").append(...folded);
}

function drawProvenance() {
  const { params, versions, machine, hashes } = data.provenance;
  const known = Object.entries(hashes);
  const folded = (title, inner) => html("details", {}, html("summary", {}, title), inner);
  find("#provenance .tables").append(
    tableOf(["machine", ""], Object.entries(machine), "Machine"),
    folded("Versions", tableOf(["package", "version"], Object.entries(versions), "Versions")),
    folded("Params, with the seeds", html("pre", { tabindex: 0 }, params)),
    folded(
      "Hashes of what this page was made from (MD5, by DVC)",
      known.length ? tableOf(["file or folder", "hash"], known, "Hashes") : html("p", {}, "Not known: there was no dvc.lock."),
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
drawTables();
drawProvenance();

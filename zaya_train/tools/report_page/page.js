"use strict";
(() => {
  const { cellsOf, painted, valueOf } = pictures;
  const page = JSON.parse(document.getElementById("data").textContent);
  const RUN_COLORS = ["#2f7ed8", "#e07b39", "#2fa36b", "#9a6bd6", "#c9a227", "#d1567f", "#3aa6b9",
    "#8c7355", "#7f8c1f", "#b04a3a"];
  const WHOLE = [1, 2, 5, 10, 20, 50, 100];
  const several = page.runs.length > 1;
  const color = (number) => RUN_COLORS[number % RUN_COLORS.length];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const ink = () => css("--muted");
  const grid = () => ({ stroke: () => css("--grid"), width: 1 });
  const charts = [];
  const shown = page.runs.map(() => true);
  const errors = [];
  window.addEventListener("error", (event) => errors.push(String(event.message)));

  function short(value) {
    if (value == null) return "";
    const size = Math.abs(value);
    const units = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "K"]];
    for (const [factor, unit] of units) {
      if (size >= factor) {
        // 10K, not 10 000: axes of a phone are narrow.
        const by = unit === "K" ? 1e3 : factor;
        return parseFloat((value / by).toPrecision(4)) + unit;
      }
    }
    if (size && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
    return String(parseFloat(value.toPrecision(5)));
  }

  function element(parent, tag, properties = {}) {
    const made = Object.assign(document.createElement(tag), properties);
    parent.appendChild(made);
    return made;
  }

  const boxOf = (id) => document.querySelector(`#${id} .plot`);
  const widthOf = (box) => Math.max(240, Math.floor(box.clientWidth));

  // Whatever is zoomed or drawn over steps moves together.
  let moving = false;
  function follow(plot, key) {
    if (key !== "x" || moving || !plot.ready) return;
    const { min, max } = plot.scales.x;
    moving = true;
    for (const { plot: other, steps } of charts) {
      if (steps && other !== plot) other.setScale("x", { min, max });
    }
    moving = false;
  }

  // Bands lie behind the lines, the phases' names in front of them.
  function bands(plot, names) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.textAlign = "left";
    ctx.textBaseline = "alphabetic";
    page.runs[0].phases.forEach(([name, first, last], number) => {
      const left = Math.max(plot.valToPos(first, "x", true), bbox.left);
      const right = Math.min(plot.valToPos(last, "x", true), bbox.left + bbox.width);
      if (right <= left) return;
      ctx.fillStyle = css("--band");
      if (!names && number % 2 === 0) ctx.fillRect(left, bbox.top, right - left, bbox.height);
      if (!names) return;
      ctx.fillStyle = ink();
      const fits = ctx.measureText(name).width < right - left - 6;
      ctx.fillText(fits ? name : String(number + 1), left + 3, bbox.top + 13 * devicePixelRatio);
    });
    ctx.restore();
  }

  // Of the runs shown, or of the one that a heat map is of.
  function marks(plot, only) {
    const { ctx, bbox } = plot;
    const bottom = bbox.top + bbox.height;
    const size = 4 * devicePixelRatio;
    const each = (steps, draw) => steps.forEach((step) => {
      const x = plot.valToPos(step, "x", true);
      if (x >= bbox.left && x <= bbox.left + bbox.width) draw(x);
    });
    const triangle = (x, tip, base) => {
      ctx.beginPath();
      ctx.moveTo(x, tip);
      ctx.lineTo(x - size, base);
      ctx.lineTo(x + size, base);
      ctx.fill();
    };
    ctx.save();
    page.runs.forEach((run, r) => {
      if (only === undefined ? !shown[r] : r !== only) return;
      ctx.strokeStyle = several ? color(r) : ink();
      ctx.fillStyle = ctx.strokeStyle;
      ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
      each(run.restarts, (x) => {
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bottom);
        ctx.stroke();
      });
      ctx.setLineDash([]);
      each(run.checkpoints, (x) => triangle(x, bottom - size, bottom + size / 2));
      ctx.fillStyle = "#d9382f";
      each(run.incidents, (x) => triangle(x, bbox.top + size, bbox.top - size / 2));
    });
    ctx.restore();
  }

  function seriesOf(line, r, number) {
    const stroke = several ? color(r) : color(number);
    return {
      label: several ? `${page.runs[r].name} ${line.label}` : line.label,
      stroke: line.faint ? stroke + "59" : stroke,
      width: line.faint ? 1 : 1.6,
      dash: line.dash ? [6, 4] : undefined,
      points: { show: Boolean(line.points), size: 4 },
      spanGaps: Boolean(line.points),
      value: (_, value) => short(value),
      run: r,
    };
  }

  // Of a wide log axis, lines at powers of ten only.
  function powers(plot, splits) {
    if (splits[splits.length - 1] < 100 * splits[0]) return splits;
    return splits.map((v) => (Number.isInteger(Math.round(Math.log10(v) * 1e6) / 1e6) ? v : null));
  }

  function options(box, series, panel) {
    const yGrid = { ...grid(), ...(panel.log ? { filter: powers } : {}) };
    const xTicks = panel.depth ? { incrs: WHOLE } : {};
    return {
      width: widthOf(box),
      height: panel.height || 230,
      series: [{ label: panel.depth ? "layer" : "step", value: (_, v) => short(v) }, ...series],
      scales: {
        x: { time: false },
        y: {
          distr: panel.log ? 3 : 1,
          range: panel.zero
            ? (_, low, high) => [Math.min(0, low ?? 0), (high || 1) * 1.08]
            : undefined,
        },
      },
      axes: [
        { stroke: ink, grid: grid(), ticks: grid(), values: (_, v) => v.map(short), space: 60,
          ...xTicks },
        { stroke: ink, grid: yGrid, ticks: yGrid, values: (_, v) => v.map(short), size: 54 },
      ],
      cursor: panel.depth ? {} : { sync: { key: "step", scales: ["x", null] } },
      hooks: panel.depth ? {} : { 
        drawClear: [(plot) => bands(plot, false)],
        draw: [(plot) => bands(plot, true), (plot) => marks(plot, panel.run)],
        setScale: [follow],
      },
    };
  }

  function add(box, opts, data, steps, id) {
    const plot = new uPlot(opts, data, box);
    charts.push({ plot, box, steps, id });
    plot.ready = true;
    return plot;
  }

  function drawPanel(panel) {
    const box = boxOf(panel.id);
    const tables = [];
    const series = [];
    let number = 0;
    page.runs.forEach((run, r) => {
      for (const table of run.panels[panel.id] || []) {
        tables.push([table.x, ...table.lines.map((line) => line.y)]);
        // Faint and full of the same thing share a colour.
        table.lines.forEach((line) => {
          const faint = table.lines[0].faint && number === 1;
          series.push(seriesOf(line, r, faint ? 0 : number));
          number += 1;
        });
      }
    });
    const data = tables.length > 1 ? uPlot.join(tables) : tables[0];
    add(box, options(box, series, panel), data, !panel.depth, panel.id);
  }

  function heat(plot, map, canvas, r) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.imageSmoothingEnabled = false;
    const left = plot.valToPos(map.first, "x", true);
    const right = plot.valToPos(map.last, "x", true);
    ctx.drawImage(canvas, left, bbox.top, right - left, bbox.height);
    ctx.strokeStyle = css("--paper");
    ctx.lineWidth = devicePixelRatio;
    for (let layer = 1; map.classes > 1 && layer < map.layers; layer += 1) {
      const y = Math.round(bbox.top + (bbox.height * layer) / map.layers);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
    }
    ctx.restore();
    marks(plot, r);
  }

  function cellWords(map, info, cells, step, y) {
    const column = Math.floor(((step - map.first) / (map.last - map.first)) * cells.columns);
    const row = Math.floor((y / map.layers) * cells.rows);
    if (column < 0 || column >= cells.columns || row < 0 || row >= cells.rows) return "";
    const value = valueOf(map, cells.greys[row * cells.columns + column]);
    const layer = Math.floor(row / map.classes) + info.first_row;
    const where = map.classes > 1 ? `layer ${layer}, class ${row % map.classes}` : `row ${layer}`;
    return `step ${short(Math.round(step))}, ${where}: ${short(value)} (${info.unit})`;
  }

  function emptied(id) {
    const box = boxOf(id);
    const old = charts.findIndex((chart) => chart.id === id);
    if (old >= 0) charts.splice(old, 1)[0].plot.destroy();
    box.textContent = "";
    return box;
  }

  // A choice made while pictures of the one before are decoded overtakes it.
  let generation = 0;

  async function drawMap(info, r) {
    const asked = generation;
    const map = page.runs[r].maps[info.id];
    const cells = map && await cellsOf(map);
    if (asked !== generation) return;
    const box = emptied(info.id);
    if (!map) {
      box.textContent = `not recorded in ${page.runs[r].name}`;
      return;
    }
    const canvas = painted(cells, info.diverging);
    const height = Math.min(560, Math.max(190, 70 + cells.rows * 4));
    const opts = options(box, [{ label: "", show: false }], { height });
    opts.scales.y = { range: [0, map.layers], dir: -1 };
    opts.axes[0].grid = { show: false };
    opts.axes[1].values = (_, ticks) => ticks.map((v) => String(v + info.first_row));
    opts.axes[1].incrs = WHOLE;
    opts.axes[1].grid = { show: false };
    opts.legend = { show: false };
    const words = document.createElement("p");
    words.className = "words";
    words.textContent = `colours from ${short(map.low)} to ${short(map.high)} (${info.unit})`;
    opts.hooks.drawClear = [(plot) => heat(plot, map, canvas, r)];
    opts.hooks.draw = [];
    opts.hooks.setCursor = [(plot) => {
      const { left, top } = plot.cursor;
      if (left < 0 || top < 0) return;
      const text = cellWords(map, info, cells, plot.posToVal(left, "x"), plot.posToVal(top, "y"));
      if (text) words.textContent = text;
    }];
    add(box, opts, [[map.first, map.last], [0, map.layers]], true, info.id);
    box.appendChild(words);
  }

  // Lines of one layer, read off the heat maps.
  async function drawLayer(info, r, layer) {
    const asked = generation;
    const map = page.runs[r].maps[info.id];
    const cells = map && await cellsOf(map);
    if (asked !== generation) return;
    const box = emptied(info.id + "_layer");
    if (!map || layer >= map.layers) return;
    const width = (map.last - map.first) / cells.columns;
    const x = Array.from({ length: cells.columns }, (_, i) => map.first + (i + 0.5) * width);
    const lines = Array.from({ length: map.classes }, (_, c) => {
      const start = (layer * map.classes + c) * cells.columns;
      return Array.from(cells.greys.subarray(start, start + cells.columns), (grey) =>
        valueOf(map, grey));
    });
    const series = lines.map((_, c) => ({
      label: String(c),
      stroke: `hsl(${Math.round((360 * c) / map.classes)} 60% 50%)`,
      width: 1.2,
      points: { show: false },
      value: (_, value) => short(value),
    }));
    const opts = options(box, series, { run: r });
    add(box, opts, [x, ...lines], true, info.id + "_layer");
  }

  function layerFigures(box) {
    const wanted = page.maps.filter((info) => info.id === "load_map" || info.id === "bias_map");
    if (!wanted.length) return null;
    const first = page.runs[0].maps[wanted[0].id];
    const bar = element(document.createElement("p"), "span");
    bar.parentNode.className = "bar";
    box.before(bar.parentNode);
    bar.textContent = "heat maps of ";
    const runs = element(bar, "select", { id: "map-run", ariaLabel: "run" });
    page.runs.forEach((run, r) => element(runs, "option", { value: r, textContent: run.name }));
    element(bar, "span", { textContent: " and lines of layer " });
    const layers = element(bar, "select", { id: "map-layer", ariaLabel: "layer" });
    for (let layer = 0; layer < (first ? first.layers : 1); layer += 1) {
      element(layers, "option", { value: layer, textContent: layer });
    }
    for (const info of wanted) {
      const figure = document.createElement("figure");
      figure.id = info.id + "_layer";
      const words = element(figure, "figcaption");
      element(words, "b", { textContent: `${info.title}, one layer` });
      words.append(`A line per class, the skip class last; ${info.unit}.`);
      element(figure, "div", { className: "plot" });
      document.getElementById(info.id).after(figure);
    }
    const redraw = async () => {
      generation += 1;
      const [asked, run, layer] = [generation, Number(runs.value), Number(layers.value)];
      for (const info of page.maps) if (asked === generation) await drawMap(info, run);
      for (const info of wanted) if (asked === generation) await drawLayer(info, run, layer);
    };
    runs.onchange = redraw;
    layers.onchange = redraw;
    return redraw;
  }

  // One switch per run, for every chart at once.
  function runSwitches() {
    if (!several) return;
    const bar = document.getElementById("runs");
    page.runs.forEach((run, r) => {
      const button = element(bar, "button", { textContent: run.name, className: "chip" });
      button.style.setProperty("--run", color(r));
      button.setAttribute("aria-pressed", "true");
      button.onclick = () => {
        shown[r] = !shown[r];
        button.setAttribute("aria-pressed", String(shown[r]));
        for (const { plot } of charts) {
          plot.batch(() => plot.series.forEach((series, number) => {
            if (series.run === r) plot.setSeries(number, { show: shown[r] });
          }));
          plot.redraw();
        }
      };
    });
  }

  function resize(width) {
    for (const { plot, box } of charts) {
      plot.setSize({ width: width || widthOf(box), height: plot.height });
    }
  }

  async function draw() {
    page.panels.forEach(drawPanel);
    runSwitches();
    const firstMap = page.maps.length ? document.getElementById(page.maps[0].id) : null;
    const redraw = firstMap ? layerFigures(firstMap) : null;
    if (redraw) await redraw();
    else for (const info of page.maps) await drawMap(info, 0);
    let waiting = 0;
    addEventListener("resize", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => resize(), 100);
    });
    // Paper is about 700 CSS pixels wide, two charts to a line.
    addEventListener("beforeprint", () => resize(310));
    addEventListener("afterprint", () => resize());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      charts.forEach(({ plot }) => plot.redraw(false));
      if (redraw) redraw();
    });
    window.zaya = { charts, errors, milliseconds: performance.now() };
    document.documentElement.dataset.drawn = "true";
  }
  draw();
})();

"use strict";
// Draws the figures from the rows beside them, and adds what needs a script: zoom buttons, tables of rows, the theme.
(() => {
  const config = JSON.parse(document.getElementById("figure-config").textContent);
  const MOST_ROWS = 1000; // shown in a table; the CSV has all

  const button = (text, label, onClick) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.setAttribute("aria-label", label);
    made.addEventListener("click", onClick);
    return made;
  };

  // --- zoom: the wheel with Ctrl and dragging are Vega's own; these buttons do the same from a keyboard

  const zoomed = (view, signal, channel, factor) => {
    const scale = view.scale(channel);
    const log = scale.type === "log";
    const [a, b] = scale.domain().map((end) => (log ? Math.log(end) : Number(end)));
    const middle = (a + b) / 2;
    const ends = [middle - ((middle - a) * factor), middle + ((b - middle) * factor)];
    view.signal(signal, log ? ends.map(Math.exp) : ends);
  };

  const tools = (figure, drawn) => {
    const bar = figure.querySelector(".tools");
    const zoomable = drawn.filter(({ zoom }) => Object.keys(zoom).length);
    if (!zoomable.length) return;
    const title = figure.id.replace("-", " ");
    const change = (factor) => zoomable.forEach(({ view, zoom }) => {
      for (const [channel, signal] of Object.entries(zoom)) {
        if (factor === null) view.signal(signal, null);
        else zoomed(view, signal, channel, factor);
      }
      view.runAsync();
    });
    bar.append(
      button("+", `Zoom in, ${title}`, () => change(0.7)),
      button("−", `Zoom out, ${title}`, () => change(1 / 0.7)),
      button("Reset", `Reset the zoom of ${title}`, () => change(null)),
    );
    const hint = document.createElement("span");
    hint.className = "quiet";
    hint.textContent = "drag to move, Ctrl + wheel to zoom";
    if (matchMedia("(hover: hover)").matches) bar.append(hint);
    bar.hidden = false;
  };

  // --- rows

  const csv = ({ columns, rows }) => {
    const cell = (value) => {
      const text = value === null ? "" : String(value);
      return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
  };

  const download = (text, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  const rowsTable = (figure, data) => {
    const place = figure.querySelector(".rows-table");
    if (place.childElementCount) return;
    const bar = document.createElement("div");
    bar.append(button("Download CSV", `Download the rows of ${figure.id.replace("-", " ")} as CSV`,
      () => download(csv(data), `${figure.id}.csv`)));
    const note = document.createElement("span");
    note.className = "quiet";
    note.textContent = " numbers to 7 significant digits; the parquet files have all" +
      (data.rows.length > MOST_ROWS ? `; the first ${MOST_ROWS} of ${data.rows.length} rows below` : "");
    bar.append(note);
    const scroll = document.createElement("div");
    scroll.className = "scroll";
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", `Rows of ${figure.id.replace("-", " ")}`);
    const table = scroll.appendChild(document.createElement("table"));
    const head = table.createTHead().insertRow();
    for (const name of data.columns) {
      const cell = head.appendChild(document.createElement("th"));
      cell.scope = "col";
      cell.textContent = name;
    }
    const body = table.createTBody();
    for (const row of data.rows.slice(0, MOST_ROWS)) {
      const line = body.insertRow();
      for (const value of row) {
        const cell = line.insertCell();
        cell.textContent = value === null ? "–" : String(value);
        if (typeof value === "string") cell.className = "text";
      }
    }
    place.append(bar, scroll);
  };

  // --- figures

  const draw = async (figure) => {
    const data = JSON.parse(figure.querySelector(":scope > script").textContent);
    const rows = data.rows.map((row) => Object.fromEntries(row.map((value, i) => [data.columns[i], value])));
    figure.querySelector("details.rows").addEventListener("toggle", () => rowsTable(figure, data));
    const drawn = [];
    for (const place of figure.querySelectorAll(".view")) {
      const { spec, zoom } = data.views[Number(place.dataset.view)];
      const alternative = place.firstElementChild;
      // beside labels of up to 210 pixels; entries of a legend are 170 wide, or as their longest name (labelLimit: 220)
      const names = (spec.layer ?? []).flatMap(({ encoding }) => encoding?.color?.scale?.domain ?? []);
      const longest = Math.max(...names.map((name) => String(name).length), 0);
      const entry = Math.max(170, Math.min(220, 7 * longest) + 46);
      const columns = Math.max(1, Math.floor((place.clientWidth - 140) / entry));
      try {
        const made = await vegaEmbed(place, { ...spec, datasets: { rows } }, {
          actions: false, config: { ...config, legend: { ...config.legend, columns } }, defaultStyle: false, renderer: "svg",
          tooltip: { disableDefaultStyle: true, theme: "page", maxDepth: 0 },
        });
        drawn.push({ view: made.view, zoom });
      } catch (error) {
        place.replaceChildren(alternative); // its words stand in for the drawing
        console.error(`${figure.id}: ${error?.stack ?? error}`);
      }
    }
    tools(figure, drawn);
  };

  // --- theme

  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => { theme.textContent = dark() ? "Light" : "Dark"; theme.setAttribute("aria-label", `${theme.textContent} theme`); };
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; label(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  theme.hidden = false;
  label();

  // One after the other, giving way to the reader in between; all are there before anybody prints.
  (async () => {
    for (const figure of document.querySelectorAll("[data-figure]")) {
      await draw(figure);
      await new Promise((go) => setTimeout(go));
    }
    root.dataset.figures = "drawn";
  })();
})();

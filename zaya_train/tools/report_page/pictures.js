"use strict";
// Heat maps come as grey PNG files: their cells, colours and values.
const pictures = (() => {
  // Blue through the paper's colour to red, or paper to blue.
  function shade(share, diverging) {
    const paper = matchMedia("(prefers-color-scheme: dark)").matches && !matchMedia("print").matches
      ? [38, 44, 53] : [247, 247, 247];
    const from = (end, part) => paper.map((value, i) => Math.round(value + (end[i] - value) * part));
    if (!diverging) return from([33, 102, 172], share);
    const off = share * 2 - 1;
    return off < 0 ? from([33, 102, 172], -off) : from([178, 24, 43], off);
  }

  const decoded = new Map();
  async function cellsOf(map) {
    if (!decoded.has(map)) {
      const image = new Image();
      image.src = `data:image/png;base64,${map.png}`;
      await image.decode();
      const canvas = document.createElement("canvas");
      canvas.width = image.width;
      canvas.height = image.height;
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      const pixels = context.getImageData(0, 0, image.width, image.height).data;
      const greys = new Uint8Array(image.width * image.height);
      for (let i = 0; i < greys.length; i += 1) greys[i] = pixels[4 * i];
      decoded.set(map, { greys, columns: image.width, rows: image.height });
    }
    return decoded.get(map);
  }

  function painted(cells, diverging) {
    const canvas = document.createElement("canvas");
    canvas.width = cells.columns;
    canvas.height = cells.rows;
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(cells.columns, cells.rows);
    const words = new Uint32Array(pixels.data.buffer);
    // Opaque, as little-endian words; grey 0 is no value and stays clear.
    const colours = Uint32Array.from({ length: 256 }, (_, grey) => {
      const [red, green, blue] = shade((grey - 1) / 254, diverging);
      return grey ? ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0 : 0;
    });
    cells.greys.forEach((grey, i) => { words[i] = colours[grey]; });
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  // uPlot's gap is null.
  const valueOf = (map, grey) =>
    grey ? map.low + ((grey - 1) / 254) * (map.high - map.low) : null;

  return { cellsOf, painted, valueOf };
})();

/* The condition: a canvas to draw on, a file to load. Its value is a PNG as a data: link. */
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d", { willReadFrequently: true });
const say = element.querySelector(".hgc-pad-said"), colours = element.querySelector(".hgc-palette");
const brush = element.querySelector("input[type=range]"), file = element.querySelector("input[type=file]");
let at = [canvas.width >> 1, canvas.height >> 1], last = null, before = [];
const ink = () => colours.querySelector("input:checked").value;
function keep() { before.push(pen.getImageData(0, 0, canvas.width, canvas.height)); before = before.slice(-20); }
function give() { props.value = canvas.toDataURL("image/png"); }
function dot(x, y) {
  const r = brush.value / 2;
  pen.fillStyle = ink();
  for (let j = Math.floor(y - r); j <= y + r; j++) for (let i = Math.floor(x - r); i <= x + r; i++)
    if ((i + .5 - x) ** 2 + (j + .5 - y) ** 2 <= Math.max(r * r, .5)) pen.fillRect(i, j, 1, 1);
}
function line(from, to) {
  const n = Math.max(1, Math.ceil(2 * Math.hypot(to[0] - from[0], to[1] - from[1])));
  for (let k = 0; k <= n; k++) dot(from[0] + (to[0] - from[0]) * k / n, from[1] + (to[1] - from[1]) * k / n);
}
function place(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
}
canvas.addEventListener("pointerdown", (e) => { canvas.setPointerCapture(e.pointerId); keep(); last = place(e); line(last, last); });
canvas.addEventListener("pointermove", (e) => { if (last) { const to = place(e); line(last, to); last = to; } });
for (const end of ["pointerup", "pointercancel"])
  canvas.addEventListener(end, () => { if (last) { last = null; give(); } });
canvas.addEventListener("keydown", (e) => {
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
  if (way) {
    const step = Math.max(1, Math.round(canvas.width / 64));
    const to = [0, 1].map((k) => Math.min(canvas.width - 1, Math.max(0, at[k] + way[k] * step)));
    if (e.shiftKey) { keep(); line(at, to); give(); }
    at = to;
  } else if (e.key === " " || e.key === "Enter") { keep(); dot(...at); give(); } else return;
  e.preventDefault();
  say.textContent = `pen at ${Math.round(at[0])}, ${Math.round(at[1])}`;
});
element.querySelector(".hgc-fill").addEventListener("click", () => {
  keep(); pen.fillStyle = ink(); pen.fillRect(0, 0, canvas.width, canvas.height); give();
});
element.querySelector(".hgc-undo").addEventListener("click", () => {
  const old = before.pop(); if (old) { pen.putImageData(old, 0, 0); give(); }
});
function show(link) {
  const image = new Image();
  image.onload = () => { pen.imageSmoothingEnabled = false; pen.drawImage(image, 0, 0, canvas.width, canvas.height); };
  image.src = link;
}
function palette() {
  colours.innerHTML = "";
  props.palette.forEach(([name, colour], i) => {
    const label = document.createElement("label"), swatch = document.createElement("i");
    const choice = Object.assign(document.createElement("input"), { type: "radio", name: "hgc-ink", value: colour, checked: i === 0 });
    swatch.style.background = colour;
    label.append(choice, swatch, name);
    colours.append(label);
  });
}
file.addEventListener("change", () => {
  const chosen = file.files[0];
  file.value = "";
  if (!chosen) return;
  if (chosen.size > props.most_bytes) { say.textContent = `a picture may have at most ${props.most_bytes >> 20} MiB`; return; }
  const reader = new FileReader();
  reader.onload = async () => {
    const found = await server.check_picture(reader.result, props.kind);
    say.textContent = found.said;
    if (found.picture) { keep(); props.value = found.picture; show(found.picture); }
  };
  reader.readAsDataURL(chosen);
});
watch("value", () => show(props.value));
watch("palette", palette);
palette();
show(props.value);

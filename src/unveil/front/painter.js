// Draws a mask over a picture. `props.value` is the picture as a data URL, or "".
// window.unveilMask() gives the mask as a PNG's data URL, white where it is drawn, or "" if nothing is.
const colour = "#6d28d9";
const state = { strokes: [], erase: false, picture: null };

function build() {
  if (element.querySelector(".stage")) return;
  element.innerHTML = `
    <div class="painter">
      <div class="stage" hidden><img alt="Your picture"><canvas aria-label="Draw over what is to be repainted"></canvas></div>
      <div class="tools" hidden>
        <label>Brush <input type="range" class="size" min="1" max="40" value="12" aria-label="Size of the brush"></label>
        <button type="button" class="erase" aria-pressed="false">Erase</button>
        <button type="button" class="undo">Undo</button>
        <button type="button" class="strokes">Random</button>
        <button type="button" class="wipe">Clear</button>
      </div>
    </div>`;
  const find = (name) => element.querySelector(name);
  const canvas = find("canvas");
  let stroke = null;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * canvas.width,
      ((event.clientY - box.top) / box.height) * canvas.height,
    ];
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    const size = (find(".size").value / 100) * Math.max(canvas.width, canvas.height);
    stroke = { size: Math.max(1, size), erase: state.erase, points: [place(event)] };
    state.strokes.push(stroke);
    show();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!stroke) return;
    const moves = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
    for (const move of moves.length ? moves : [event]) stroke.points.push(place(move));
    show();
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (stroke = null));
  find(".erase").addEventListener("click", () => {
    state.erase = !state.erase;
    find(".erase").setAttribute("aria-pressed", state.erase);
  });
  find(".undo").addEventListener("click", () => {
    state.strokes.pop();
    show();
  });
  find(".wipe").addEventListener("click", () => {
    state.strokes = [];
    show();
  });
  find(".strokes").addEventListener("click", () => {
    const [W, H] = [canvas.width, canvas.height];
    for (let i = 0; i < 3; i++) {
      let [x, y] = [Math.random() * W, Math.random() * H];
      let angle = Math.random() * 2 * Math.PI;
      const points = [[x, y]];
      for (let j = 0; j < 4; j++) {
        angle += Math.random() * 2 - 1;
        const step = (0.08 + 0.1 * Math.random()) * Math.max(W, H);
        x = Math.min(W, Math.max(0, x + step * Math.cos(angle)));
        y = Math.min(H, Math.max(0, y + step * Math.sin(angle)));
        points.push([x, y]);
      }
      state.strokes.push({ size: (0.04 + 0.05 * Math.random()) * Math.max(W, H), erase: false, points });
    }
    show();
  });
}

function draw(canvas, ink) {
  const pen = canvas.getContext("2d");
  pen.lineCap = pen.lineJoin = "round";
  for (const { size, erase, points } of state.strokes) {
    pen.globalCompositeOperation = erase ? "destination-out" : "source-over";
    pen.strokeStyle = pen.fillStyle = ink;
    pen.lineWidth = size;
    pen.beginPath();
    pen.moveTo(...points[0]);
    for (const point of points) pen.lineTo(...point);
    pen.stroke();
  }
  pen.globalCompositeOperation = "source-over";
}

function show() {
  const canvas = element.querySelector("canvas");
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  draw(canvas, colour);
}

function load() {
  build();
  const picture = props.value || "";
  if (picture === state.picture) return;
  state.picture = picture;
  state.strokes = [];
  const [stage, tools, image] = [".stage", ".tools", "img"].map((name) => element.querySelector(name));
  stage.hidden = tools.hidden = !picture;
  if (!picture) return image.removeAttribute("src");
  image.onload = () => {
    const canvas = element.querySelector("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    show();
  };
  image.src = picture;
}

window.unveilMask = () => {
  const canvas = element.querySelector("canvas");
  if (!state.picture || !state.strokes.length) return "";
  const layer = document.createElement("canvas");
  const mask = document.createElement("canvas");
  [layer.width, layer.height] = [mask.width, mask.height] = [canvas.width, canvas.height];
  draw(layer, "#fff");
  const pen = mask.getContext("2d");
  pen.fillStyle = "#000";
  pen.fillRect(0, 0, mask.width, mask.height);
  pen.drawImage(layer, 0, 0);
  return mask.toDataURL("image/png");
};

load();
watch("value", load);

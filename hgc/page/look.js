/* Called by the handlers of hgc/page/markup.py. No request is made. */
function hgcSlide(range) {
  range.parentNode.style.setProperty("--at", range.value + "%");
}
function hgcWhy(cell) {
  cell.closest(".hgc-plan").querySelector(".hgc-why").textContent = cell.title;
}
function hgcCopy(button) {
  const code = button.parentNode.querySelector("code").textContent;
  navigator.clipboard.writeText(code).then(
    () => { button.textContent = "copied"; },
    () => { button.textContent = "select the lines and copy them"; });
}
function hgcShow() {
  const chosen = Array.from(document.querySelectorAll("select[data-hgc]"), (one) => one.value);
  for (const card of document.querySelectorAll("[data-card]")) {
    card.hidden = card.dataset.card !== chosen.join("/");
  }
}

// A figure that was drawn while it was folded away has no width: it takes one when it is opened.
document.addEventListener("toggle", () => window.dispatchEvent(new Event("resize")), true);

// What the theme leaves out for readers who do not see the page or use no mouse.
document.addEventListener("DOMContentLoaded", () => {
  for (const caption of document.querySelectorAll(".caption[role=heading]")) caption.setAttribute("aria-level", "2");
  for (const head of document.querySelectorAll("thead th:not([scope])")) head.scope = "col";
  for (const block of document.querySelectorAll("pre, .table-wrapper, .math")) {
    if (block.scrollWidth > block.clientWidth) block.tabIndex = 0;
  }
});

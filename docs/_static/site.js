// A figure that was drawn while it was folded away has no width: it takes one when it is opened.
document.addEventListener("toggle", () => window.dispatchEvent(new Event("resize")), true);

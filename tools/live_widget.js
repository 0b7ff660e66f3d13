// A stand-in for the model that anywidget gives to a widget's module.
async function show(element, { state, buffers }) {
  for (const { path, data } of buffers) {
    const owner = path.slice(0, -1).reduce((place, key) => place[key], state);
    owner[path.at(-1)] = new DataView(Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0)).buffer);
  }
  const listeners = {};
  const shown = { sent: [], saved: 0 };
  shown.model = {
    get: (name) => state[name],
    set(name, value) {
      state[name] = value;
      (listeners[`change:${name}`] ?? []).forEach((one) => one());
    },
    on: (event, one) => (listeners[event] ??= []).push(one),
    off: (event, one) => (listeners[event] = (listeners[event] ?? []).filter((other) => other !== one)),
    save_changes: () => (shown.saved += 1),
    send: (message) => shown.sent.push(message),
  };
  element.before(Object.assign(document.createElement("style"), { textContent: state._css }));
  const source = URL.createObjectURL(new Blob([state._esm], { type: "text/javascript" }));
  const { default: widget } = await import(source);
  shown.close = widget.render({ model: shown.model, el: element });
  return shown;
}

// Elements. Text is only ever set as text: nothing on this page is parsed as HTML.

/** A new element; `properties` are the element's own, `children` nodes or texts. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A button that does something; `label` says more than its text where that is not enough. */
export function button(text, onclick, label = "") {
  const made = element("button", { type: "button", onclick }, text);
  if (label) made.ariaLabel = label;
  return made;
}

/** Copies a text, and says so on the button for a moment. */
export function copyButton(text, label) {
  const made = button("Copy", async () => {
    made.textContent = (await copied(text())) ? "Copied" : "Not copied";
    setTimeout(() => (made.textContent = "Copy"), 1500);
  }, label);
  made.ariaLive = "polite";
  return made;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // over plain HTTP, but for localhost, there is no clipboard
    const area = element("textarea", { value: text, className: "unseen" });
    const before = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus();
    return done;
  }
}

/** Make a textarea as tall as its text. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

/** Enter sends, Shift+Enter begins a line; not while an input method composes a word. */
export function isSend(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

/** Say something to screen readers, once. */
export function announce(text) {
  if (text.trim()) document.getElementById("announcer").append(element("p", {}, text));
}

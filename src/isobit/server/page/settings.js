// Settings of sampling, kept in this browser; what is empty is left to the server.

const NAME = "isobit.settings";
const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");

/** Fill the form with what was kept, and keep what is changed. */
export function begin() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch { /* none */ }
  for (const field of form.elements) {
    if (field.name && typeof kept[field.name] === "string") field.value = kept[field.name];
  }
  form.addEventListener("input", keep);
  document.getElementById("open-settings").onclick = () => dialog.showModal();
  document.getElementById("defaults").onclick = () => {
    form.reset();
    keep();
  };
}

function keep() {
  try {
    localStorage.setItem(NAME, JSON.stringify(Object.fromEntries(new FormData(form))));
  } catch { /* they hold until the page is left */ }
}

export function close() {
  dialog.close();
}

/** The system prompt. */
export function system() {
  return form.elements.system.value.trim();
}

/** The fields of a request; whole numbers as BigInt, as a seed has 64 bits. */
export function fields() {
  const found = {};
  for (const field of form.querySelectorAll("input")) {
    const { name, value } = field;
    if (value !== "") found[name] = /^-?\d+$/.test(value) ? BigInt(value) : Number(value);
  }
  const thinking = form.elements.thinking.value;
  if (thinking) found.enable_thinking = thinking === "on";
  return found;
}

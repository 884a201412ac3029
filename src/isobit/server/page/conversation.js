// What was said, kept in this browser: a list of { role, text, thinking, note, stats, receipt,
// verdict }. Each tab has its own; a new one begins with what was kept last.

const NAME = "isobit.conversation";
const DRAFT = "isobit.draft";

/** The conversation that was kept; what is malformed in it is left out. */
export function load() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME) ?? "[]");
    return Array.isArray(kept) ? kept.filter(isMessage) : [];
  } catch {
    return [];
  }
}

function isMessage(message) {
  return ["user", "assistant"].includes(message?.role) && typeof message.text === "string"
    && ["string", "undefined"].includes(typeof message.receipt);
}

/** Keep it; receipts are large, and go when they do not fit. Whether it was kept at all. */
export function save(messages) {
  const lean = messages.map(({ receipt, ...message }) => message);
  const kept = ["sessionStorage", "localStorage"].map((storage) =>
    [messages, lean].some((each) => put(storage, NAME, JSON.stringify(each))));
  return kept.every(Boolean);
}

/** What was being written when the tab was left. */
export function draft() {
  try {
    return sessionStorage.getItem(DRAFT) ?? "";
  } catch {
    return "";
  }
}

export function saveDraft(text) {
  put("sessionStorage", DRAFT, text);
}

function put(storage, name, text) {
  try {
    window[storage].setItem(name, text);
    return true;
  } catch { // no room, or no storage
    return false;
  }
}

/** The messages as the server takes them. */
export function asked(messages, system) {
  const said = messages.map(({ role, text }) => ({ role, content: text }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

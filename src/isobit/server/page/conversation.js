// What was said, kept in this browser: a list of { role, text, thinking, note, stats, receipt,
// verdict }.

const NAME = "isobit.conversation";

/** The conversation that was kept; what is malformed in it is left out. */
export function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(NAME) ?? "[]");
    return Array.isArray(kept) ? kept.filter(isMessage) : [];
  } catch {
    return [];
  }
}

function isMessage(message) {
  return ["user", "assistant"].includes(message?.role) && typeof message.text === "string";
}

/** Keep it; receipts are large, and go when they do not fit. Whether it was kept at all. */
export function save(messages) {
  const lean = messages.map(({ receipt, ...message }) => message);
  for (const kept of [messages, lean]) {
    try {
      localStorage.setItem(NAME, JSON.stringify(kept));
      return true;
    } catch { /* no room, or no storage */ }
  }
  return false;
}

/** Tell when another tab has changed it. */
export function watch(changed) {
  addEventListener("storage", (event) => event.key === NAME && changed());
}

/** The messages as the server takes them. */
export function asked(messages, system) {
  const said = messages.map(({ role, text }) => ({ role, content: text }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

// Code in colours: Prism's tokens as spans. A language is fetched when it is first needed.

const NEEDS = {
  bash: [], c: ["clike"], clike: [], cpp: ["c"], csharp: ["clike"], css: [], diff: [], docker: [],
  go: ["clike"], ini: [], java: ["clike"], javascript: ["clike"], json: [], kotlin: ["clike"],
  lua: [], markup: [], python: [], ruby: ["clike"], rust: [], sql: [], swift: [], toml: [],
  typescript: ["javascript"], yaml: [],
};
const ALIASES = {
  "c++": "cpp", cc: "cpp", cs: "csharp", dockerfile: "docker", golang: "go", h: "c", hpp: "cpp",
  html: "markup", js: "javascript", jsx: "javascript", kt: "kotlin", patch: "diff", py: "python",
  python3: "python", rb: "ruby", rs: "rust", sh: "bash", shell: "bash", svg: "markup",
  ts: "typescript", tsx: "typescript", xml: "markup", yml: "yaml", zsh: "bash",
};
const MOST = 100_000; // characters; a longer text stays as it is
const fetched = new Map();

/** Show `code` in `target`, in colours if its language is known. */
export function highlight(target, code, name) {
  target.textContent = code;
  const language = ALIASES[name] ?? name;
  if (!Object.hasOwn(NEEDS, language) || code.length > MOST) return;
  const paint = () => {
    if (target.textContent === code) target.replaceChildren(...spans(tokens(code, language)));
  };
  if (Prism.languages[language]) paint();
  else fetchLanguage(language).then(paint, () => {}); // without colours it can be read, too
}

function fetchLanguage(language) {
  if (!fetched.has(language)) {
    const needs = Promise.all(NEEDS[language].map(fetchLanguage));
    fetched.set(language, needs.then(() => import(`./vendor/prism/prism-${language}.min.js`)));
  }
  return fetched.get(language);
}

function tokens(code, language) {
  return Prism.tokenize(code, Prism.languages[language]);
}

function spans(found) {
  return [found].flat().map((token) => {
    if (typeof token === "string") return document.createTextNode(token);
    const span = document.createElement("span");
    span.className = ["token", token.type, token.alias ?? []].flat().join(" ");
    span.append(...spans(token.content));
    return span;
  });
}

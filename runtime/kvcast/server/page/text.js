// Text of a model as nodes: only text, with code blocks. Nothing of it is ever read as markup.

export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

/** Text with `code` in it. */
const words = (text) => text.split(/`([^`\n]+)`/).map((part, i) => (i % 2 ? element("code", { textContent: part }) : part));

/** Paragraphs and code blocks (``` to ```). */
export function render(text) {
  return text.split(/^```/m).map((part, i) => {
    if (i % 2 === 0) return element("p", {}, ...words(part.trim()));
    const end = part.indexOf("\n");
    const code = end < 0 ? "" : part.slice(end + 1).trimEnd();
    return element("div", { className: "code" }, copyButton(() => code), element("pre", { tabIndex: 0 }, element("code", { textContent: code })));
  }).filter((node) => node.textContent);
}

export function copyButton(text) {
  const button = element("button", { type: "button", textContent: "Copy" });
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return button;
}

export const number = (n) => Math.round(n).toLocaleString("en");

export function bytes(n) {
  return n >= 1e9 ? `${(n / 1e9).toFixed(1)} GB` : n >= 1e6 ? `${number(n / 1e6)} MB` : n >= 1e3 ? `${number(n / 1e3)} KB` : `${n} bytes`;
}

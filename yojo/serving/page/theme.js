// The theme: applied before anything is painted (so this is a script of its own, in the head), and chosen.
(() => {
  const NAME = "yojo-theme";
  const root = document.documentElement;
  let kept = null; // where the browser lets nobody keep anything, a choice lasts as long as the page
  try {
    kept = localStorage.getItem(NAME);
  } catch {}
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  document.addEventListener("DOMContentLoaded", () => {
    const select = document.getElementById("theme");
    select.value = root.dataset.theme ?? "system";
    select.addEventListener("change", () => {
      if (select.value === "system") delete root.dataset.theme;
      else root.dataset.theme = select.value;
      try {
        localStorage.setItem(NAME, select.value);
      } catch {}
    });
  });
})();

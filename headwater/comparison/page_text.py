"""The parts of a report that are the same in all: its style and the script that draws its plots."""

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Headwater: comparison of modes</title>
<style>
:root { color-scheme: light dark; --text: #1d2530; --soft: #5a6675; --back: #f6f8fa; --card: #ffffff;
  --line: #dde3ea; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e8ee; --soft: #9aa7b5; --back: #11161c;
  --card: #1a212a; --line: #303a46; --mark: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 1rem; }
p { max-width: 75ch; color: var(--soft); }
.verdict { color: var(--text); font-size: 1.15rem; border-left: 4px solid var(--mark); padding: .4rem 1rem;
  background: var(--card); border-radius: 0 8px 8px 0; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .7rem 1rem 0; color: var(--soft); font-size: .9rem; }
th, td { padding: .5rem 1rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; } thead th { color: var(--soft); font-weight: 500; }
th:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 370px), 1fr)); gap: 1rem;
  margin: 1rem 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem; min-width: 0; }
.full { grid-column: 1 / -1; }
figcaption { font-weight: 600; padding: 0 .3rem .3rem; } .plot { height: 350px; }
</style></head>"""

SCRIPT = """
function drawn() {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue('--text').trim(), line = style.getPropertyValue('--line').trim();
  const axis = {gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true};
  FIGURES.forEach((figure, number) => {
    const layout = Object.assign({}, figure.layout, {
      paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', font: {color: text, size: 13},
      margin: {l: 55, r: 10, t: 10, b: 45}, legend: {orientation: 'h', y: -0.22},
      xaxis: Object.assign({}, axis, figure.layout.xaxis),
      yaxis: Object.assign({}, axis, figure.layout.yaxis)});
    Plotly.react('plot-' + number, figure.data, layout, {responsive: true, displayModeBar: false});
  });
}
drawn();
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', drawn);
"""

"""How a page looks: light and dark, narrow and wide, with the fonts that the system has."""

STYLE = """
:root { --back: #f4f6f9; --card: #ffffff; --text: #1c242e; --soft: #5b6876; --line: #dde4ec; --mark: #2f6fde;
  --good: #1f8a58; --warn: #a86400; --bad: #c03a3a; }
.body--dark { --back: #0f141a; --card: #171e26; --text: #e4e9ef; --soft: #96a3b2; --line: #2a3440;
  --mark: #5aa2ff; --good: #4cc38a; --warn: #e8a33d; --bad: #ff7b72; }
body, .nicegui-content { background: var(--back); color: var(--text);
  font-family: system-ui, "Segoe UI", Roboto, sans-serif; }
.nicegui-content { padding: 0; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.hw, .hw * { box-sizing: border-box; }
.hw { width: 100%; max-width: 1480px; margin: 0 auto; padding: 20px 24px 48px; }
.hw header { display: flex; flex-wrap: wrap; align-items: center; gap: 10px 16px; margin-bottom: 16px; }
.hw h1 { font-size: 1.35rem; font-weight: 650; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
.hw h2 { font-size: .82rem; font-weight: 600; line-height: 1.2; margin: 0 0 10px; color: var(--soft);
  text-transform: uppercase; letter-spacing: .06em; }
.pill { padding: 4px 12px; border-radius: 99px; font-size: .88rem; font-weight: 600; border: 1px solid; }
.pill.good { color: var(--good); } .pill.warn { color: var(--warn); } .pill.bad { color: var(--bad); }
.about { color: var(--soft); font-size: .92rem; }
.push { margin-left: auto; }
.toggle { border: 1px solid var(--line); background: var(--card); color: var(--text); border-radius: 8px;
  padding: 6px 12px; font-size: .88rem; cursor: pointer; }
.toggle:focus-visible, .scroll:focus-visible { outline: 3px solid var(--mark); outline-offset: 2px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 12px;
  margin: 0 0 14px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: 12px 16px; margin: 0; }
.tile dt { color: var(--soft); font-size: .82rem; } .tile dd { margin: 0; font-size: 1.3rem; font-weight: 620;
  font-variant-numeric: tabular-nums; letter-spacing: -.02em; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.tile dd.more { font-size: .82rem; font-weight: 400; color: var(--soft); letter-spacing: 0;
  white-space: normal; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 14px;
  margin-bottom: 14px; width: 100%; }
.grid2.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); }
.card { padding: 16px 18px; min-width: 0; width: 100%; }
.card.wide { margin-bottom: 14px; }
.chart { height: 250px; width: 100%; }
.scroll { overflow: auto; max-height: 470px; width: 100%; border-radius: 6px; }
.hw table { border-collapse: collapse; width: 100%; font-size: .92rem; }
.hw th, .hw td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.hw thead th { position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 500;
  font-size: .82rem; }
.hw tbody tr:last-child > * { border-bottom: 0; }
.hw th:first-child, .hw th.text, .hw td.state, .hw td.note { text-align: left; }
.hw td.state { max-width: 520px; overflow: hidden; text-overflow: ellipsis; }
.hw td.note { white-space: normal; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 9px;
  background: var(--good); }
.state.waits .dot { background: var(--warn); } .state.gone .dot { background: var(--bad); }
.state.gone, .number.late { color: var(--bad); }
.waits { list-style: none; margin: 0; padding: 0; } .waits li { padding: 4px 0; font-size: 1.02rem; }
.waits .who { font-weight: 650; margin-right: 4px; }
.slowest { color: var(--soft); margin: 8px 0 0; }
.quiet { color: var(--soft); margin: 0; }
.events { list-style: none; margin: 0; padding: 0; } .events li { padding: 4px 0; }
.events time { display: inline-block; min-width: 92px; color: var(--soft); font-size: .88rem; }
@media (max-width: 640px) { .hw { padding: 14px 12px 32px; } .hw td.state { max-width: 200px; } }
"""

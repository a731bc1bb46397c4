"""``GET /``: a page for a technician who stands in front of the device; ``GET /docs``: the API, for people.

Both are self-contained, ask no other host and know nothing of this device until they have asked it: they are
served to whoever knocks. Where the port is guarded they ask for a token and keep it in the tab. Strings in a
module are installed wherever the code is. Everything that they show is set as text, never as markup.
"""

from __future__ import annotations

from typing import Final

_STYLE: Final = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--text:#1b1f24;--soft:#5b6570;--line:#dde1e6;
--model:#2563c9;--fallback:#b45f06;--good:#0b6e37;--warn:#8a5a00;--bad:#b3261e;--chip:#eef1f5}
@media(prefers-color-scheme:dark){:root{--page:#14171a;--card:#1d2125;--text:#e6e9ec;--soft:#9aa4ae;
--line:#31373d;--model:#7fb0ff;--fallback:#f0b25a;--good:#6fcf97;--warn:#e6c15a;--bad:#ff8a80;--chip:#2a2f35}}
*{box-sizing:border-box}
body{font:15px/1.45 system-ui,sans-serif;margin:0;background:var(--page);color:var(--text)}
header,main{max-width:66rem;margin:0 auto;padding:0 1rem}
header{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;align-items:baseline;padding-top:1.2rem}
h1{font-size:1.35rem;margin:0}h2{font-size:1.1rem;margin:0}
h3{font-size:.8rem;margin:0 0 .4rem;color:var(--soft);font-weight:600}
.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:1rem 1.1rem;
margin:1rem 0}
.soft{color:var(--soft)}.good{color:var(--good)}.warn{color:var(--warn)}.bad{color:var(--bad)}
.chip{background:var(--chip);border-radius:1rem;padding:.1rem .7rem;font-size:.85rem;font-weight:600}
.row{display:flex;flex-wrap:wrap;gap:.3rem 1rem;align-items:baseline}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:1.2rem 2.5rem;
margin-top:1rem}
.figures{display:flex;flex-wrap:wrap;gap:.4rem 2rem;margin-top:.8rem}
.figures div{min-width:5.5rem}.figures b{display:block;font-size:1.3rem;font-weight:600}
table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:.22rem .6rem .22rem 0;vertical-align:top}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;padding-right:0}
tr+tr td{border-top:1px solid var(--line)}
svg{width:100%;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.share{display:flex;height:.7rem;border-radius:.35rem;overflow:hidden;background:var(--chip);gap:2px}
.share i{display:block}
.key{display:inline-block;width:.7rem;height:.7rem;border-radius:.2rem;margin-right:.4rem}
code,pre{font:13px/1.45 ui-monospace,monospace;background:var(--chip);border-radius:.3rem;
padding:.1rem .3rem}
pre{padding:.7rem;overflow:auto;white-space:pre-wrap;margin:.3rem 0}
a{color:var(--model)}ul{margin:.3rem 0;padding-left:1.2rem}form{display:none}
input,button{font:inherit;padding:.3rem .6rem;border:1px solid var(--line);border-radius:.4rem;
background:var(--card);color:var(--text)}
details{border-top:1px solid var(--line);padding:.5rem 0}summary{cursor:pointer}
.method{display:inline-block;min-width:3.2rem;font-weight:700}
"""

_ASK: Final = """
const $ = id => document.getElementById(id);
function make(tag, text, kind) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (kind) element.className = kind;
  return element;
}
function put(parent, ...children) { parent.append(...children); return parent; }
async function ask(path, options = {}) {
  const token = sessionStorage.getItem('token');
  const headers = {...options.headers, ...(token ? {Authorization: 'Bearer ' + token} : {})};
  const answer = await fetch(path, {...options, headers, cache: 'no-store'});
  $('door').style.display = answer.status === 401 ? 'block' : 'none';
  return answer;
}
$('door').addEventListener('submit', event => {
  event.preventDefault();
  sessionStorage.setItem('token', $('token').value.trim());
  $('token').value = '';
  $('door').style.display = 'none';
});
"""

_DOOR: Final = """<form id="door" class="card"><label>This device wants a token
<input id="token" type="password" autocomplete="off" required></label> <button>Use it</button></form>"""

PAGE: Final = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>edge-agent</title>
<style>{_STYLE}</style>
<header><h1 id="device">edge-agent</h1><span id="about" class="soft"></span><span id="health"></span>
<span class="soft" style="margin-left:auto"><a href="/docs">API</a></span></header>
<main>{_DOOR}
<ul id="reasons"></ul>
<div id="models"></div>
<p class="soft" id="note">asking the agent</p>
</main>
<script>{_ASK}
const NS = 'http://www.w3.org/2000/svg';
function draw(tag, attributes, text) {{
  const element = document.createElementNS(NS, tag);
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  if (text !== undefined) element.textContent = text;
  return element;
}}
function parse(text) {{
  const samples = [];
  for (const line of text.split('\\n')) {{
    const match = line.match(/^(\\w+)(?:\\{{(.*)\\}})? (\\S+)$/);
    if (!match) continue;
    const labels = {{}};
    for (const [, name, value] of (match[2] ?? '').matchAll(/(\\w+)="((?:[^"\\\\]|\\\\.)*)"/g))
      labels[name] = value;
    samples.push({{name: match[1], labels, value: Number(match[3].replace('Inf', 'Infinity'))}});
  }}
  return samples;
}}
const count = value => Math.round(value).toLocaleString();
function span(seconds) {{
  if (seconds >= 1) return +seconds.toPrecision(2) + ' s';
  return seconds >= 1e-3 ? +(seconds * 1e3).toPrecision(2) + ' ms' : +(seconds * 1e6).toPrecision(2) + ' µs';
}}
function ago(seconds) {{
  for (const [name, size] of [['d', 86400], ['h', 3600], ['min', 60]])
    if (seconds >= size) return Math.floor(seconds / size) + ' ' + name;
  return Math.max(0, Math.floor(seconds)) + ' s';
}}
function quantile(buckets, share) {{  /* the upper bound of the bucket that holds it */
  const total = buckets.reduce((sum, bucket) => sum + bucket.count, 0);
  let seen = 0;
  for (const bucket of buckets) {{
    seen += bucket.count;
    if (total && seen >= share * total)
      return bucket.le === Infinity ? 'over ' + span(buckets.at(-2).le) : '≤ ' + span(bucket.le);
  }}
  return '–';
}}
function histogram(buckets) {{
  const width = 480, height = 150, base = 116, step = width / buckets.length;
  const top = Math.max(1, ...buckets.map(bucket => bucket.count));
  const svg = draw('svg', {{viewBox: `0 0 ${{width}} ${{height}}`, role: 'img',
    'aria-label': 'how long answers took'}});
  svg.append(draw('line', {{x1: 0, x2: width, y1: base + .5, y2: base + .5, stroke: 'var(--line)'}}));
  buckets.forEach((bucket, index) => {{
    const tall = bucket.count ? Math.max(2, bucket.count / top * (base - 16)) : 0;
    const bar = draw('rect', {{x: index * step + 2, width: step - 4, y: base - tall, height: tall, rx: 2,
      fill: 'var(--model)'}});
    const label = bucket.le === Infinity ? 'more' : span(bucket.le);
    bar.append(draw('title', {{}}, `${{label}}: ${{count(bucket.count)}} requests`));
    svg.append(bar, draw('text', {{x: (index + .5) * step, y: base + 14, 'text-anchor': 'middle'}},
      label.replace(' ', '')));
    if (bucket.count) svg.append(draw('text', {{x: (index + .5) * step, y: base - tall - 4,
      'text-anchor': 'middle'}}, bucket.count < 1e4 ? bucket.count : (bucket.count / 1e3).toFixed(0) + 'k'));
  }});
  svg.append(draw('text', {{x: width / 2, y: height - 2, 'text-anchor': 'middle'}},
    'from request to answer, up to'));
  return svg;
}}
function table(rows) {{
  const body = make('table');
  for (const [label, value, kind] of rows) {{
    if (value === undefined || value === null || value === '') continue;
    put(body, put(make('tr'), make('td', label, 'soft'), make('td', value, kind)));
  }}
  return body;
}}
const before = new Map();
function card(model, samples, updates, now) {{
  const mine = samples.filter(s => s.labels.model === model.name);
  const sum = (name, labels = {{}}) => mine
    .filter(s => s.name === name && Object.entries(labels).every(([key, value]) => s.labels[key] === value))
    .reduce((total, s) => total + s.value, 0);
  const has = name => mine.some(s => s.name === name);
  const version = {{version: model.version ?? ''}};
  const box = make('section', null, 'card');
  const kind = {{ready: 'good', loading: 'warn'}}[model.state] ?? 'bad';
  put(box, put(make('div', null, 'row'), make('h2', model.name), make('span', model.version ?? ''),
    make('span', model.state, 'chip ' + kind), make('span', model.reason, 'soft'),
    make('span', [model.precision, (model.digest ?? '').slice(7, 19)].filter(Boolean).join(' · '), 'soft')));

  const rows = sum('edge_answers_total');
  const last = before.get(model.name);
  before.set(model.name, {{rows, now}});
  const rate = last && now > last.now ? Math.max(0, rows - last.rows) / (now - last.now) : null;
  let below = 0;  /* the buckets of the exposition are cumulated */
  const buckets = mine.filter(s => s.name === 'edge_inference_duration_seconds_bucket'
      && s.labels.version === model.version)
    .map(s => ({{le: s.labels.le === '+Inf' ? Infinity : Number(s.labels.le), count: s.value}}))
    .sort((a, b) => a.le - b.le)
    .map(b => {{ const own = b.count - below; below = b.count; return {{le: b.le, count: own}}; }});
  const passed = sum('edge_decisions_total', {{...version, decision: 'pass'}});
  const failed = sum('edge_decisions_total', {{...version, decision: 'fail'}});
  const figures = make('div', null, 'figures');
  for (const [label, value] of [['answers', count(rows)],
      ['per second', rate === null ? '–' : rate < 10 ? +rate.toFixed(1) : count(rate)],
      ['half take', quantile(buckets, .5)], ['99 % take', quantile(buckets, .99)],
      ['decided fail', passed + failed ? (100 * failed / (passed + failed)).toFixed(1) + ' %' : '–']])
    put(figures, put(make('div'), make('span', label, 'soft'), make('b', value)));
  put(box, figures);

  const grid = make('div', null, 'grid');
  put(grid, put(make('div'), make('h3', 'Latency'),
    buckets.length ? histogram(buckets) : make('p', 'no answers yet', 'soft')));

  const sources = put(make('div'), make('h3', 'Answers by source'));
  const share = make('div', null, 'share');
  for (const source of ['model', 'fallback']) {{
    const part = make('i');
    const got = sum('edge_answers_total', {{source}});
    part.style.cssText = `background:var(--${{source}});flex:${{got}} 0 0`;
    if (got) put(share, part);
  }}
  const answers = make('table');
  for (const s of mine.filter(s => s.name === 'edge_answers_total' && s.value > 0)
      .sort((a, b) => b.value - a.value).slice(0, 12)) {{
    const key = make('span', null, 'key');
    key.style.background = `var(--${{s.labels.source}})`;
    const reason = s.labels.reason === 'ok' ? '' : ': ' + s.labels.reason;
    put(answers, put(make('tr'), put(make('td'), key, s.labels.source + reason),
      make('td', s.labels.version, 'soft'), make('td', count(s.value), 'number')));
  }}
  put(sources, share, rows ? answers : make('p', 'no answers yet', 'soft'));
  put(grid, sources);

  const drifting = sum('edge_drift_features');
  const drift = table([
    ['verdict', model.drifting === null || model.drifting === undefined ? 'no full window yet'
      : model.drifting ? 'drifting' : 'as in the baseline', model.drifting ? 'bad' : ''],
    ['features that drift', has('edge_drift_features') ? count(drifting) : null],
    ['largest PSI of a feature', has('edge_drift_score') ? sum('edge_drift_score',
      {{statistic: 'psi_max'}}).toFixed(3) : null],
    ['PSI of the score', has('edge_drift_score') ? sum('edge_drift_score',
      {{statistic: 'psi_score'}}).toFixed(3) : null],
    ['rows in this window', has('edge_drift_window_rows') ? count(sum('edge_drift_window_rows')) : null]]);
  put(grid, put(make('div'), make('h3', 'Drift'), drift));

  const update = (updates.models ?? {{}})[model.name] ?? {{}};
  put(grid, put(make('div'), make('h3', 'Last update'), table([
    ['state', update.state],
    ['last result', update.last_result ?? 'none yet',
      /fail|reject|timed/.test(update.last_result ?? '') ? 'bad' : ''],
    ['reason', update.last_reason], ['', update.last_message],
    ['candidate', update.candidate?.version],
    ['rejected here', (update.rejected ?? []).map(r => r.version + ' (' + r.reason + ')').join(', ')],
    ['repository', updates.source ? (updates.last_check
      ? 'looked at ' + ago(now - updates.last_check) + ' ago' : 'not reached yet') : 'none is followed'],
    ['trouble', updates.trouble?.message, 'bad']])));
  put(box, grid);
  return box;
}}
async function refresh() {{
  try {{
    const [answer, metrics] = await Promise.all([ask('/status'), ask('/metrics')]);
    if (answer.status === 401) {{ $('note').textContent = ''; return; }}
    if (!answer.ok || !metrics.ok) throw new Error((await (answer.ok ? metrics : answer).json()).error);
    const status = await answer.json(), now = Date.now() / 1000;
    const samples = parse(await metrics.text());
    $('device').textContent = document.title = status.device;
    $('about').textContent = `edge-agent ${{status.agent}}, up ${{ago(status.uptime_seconds)}}`;
    const health = status.health;
    $('health').textContent = !health.live ? 'stuck' : !health.ready ? 'not ready'
      : health.degraded ? 'look here' : 'all well';
    $('health').className = 'chip ' + (!health.ready ? 'bad' : health.degraded ? 'warn' : 'good');
    $('reasons').replaceChildren(...health.reasons.map(reason => make('li', reason, 'warn')));
    $('models').replaceChildren(...status.models.map(m => card(m, samples, status.updates, now)));
    if (!status.models.length) $('models').append(put(make('section', null, 'card'),
      make('p', 'No model is installed. On the device: '), make('code', 'edge-agent install BUNDLE')));
    $('note').textContent = 'as of ' + new Date().toLocaleTimeString() + ', refreshed every 2 s';
    $('note').className = 'soft';
  }} catch (error) {{
    $('note').textContent = 'the agent does not answer: ' + error.message;
    $('note').className = 'bad';
  }}
}}
async function live() {{
  await refresh();
  setTimeout(live, 2000);
}}
live();
</script>
</html>
""".encode()

DOCS_PAGE: Final = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>edge-agent API</title>
<style>{_STYLE}</style>
<header><h1>edge-agent API</h1><span id="about" class="soft"></span>
<span class="soft" style="margin-left:auto"><a href="/">this device</a> ·
<a href="/openapi.json">openapi.json</a>
</span></header>
<main>{_DOOR}<p id="note"></p><div id="operations"></div>
<section class="card"><h2>Schemas</h2><div id="schemas"></div></section></main>
<script>{_ASK}
const json = value => make('pre', JSON.stringify(value, null, 2));
function name(reference) {{ return reference.split('/').pop(); }}
function schemaText(schema) {{
  if (!schema) return '';
  if (schema.$ref) return name(schema.$ref);
  if (schema.anyOf) return schema.anyOf.map(schemaText).join(' | ');
  const type = [].concat(schema.type ?? 'anything').join(' | ');
  if (schema.type === 'array') return 'list of ' + schemaText(schema.items);
  return schema.enum ? schema.enum.map(v => JSON.stringify(v)).join(' | ') : type;
}}
function fields(schema) {{
  const table = make('table');
  for (const [field, value] of Object.entries(schema.properties ?? {{}})) {{
    const must = (schema.required ?? []).includes(field) ? '' : ' (optional)';
    put(table, put(make('tr'), put(make('td'), make('code', field), make('span', must, 'soft')),
      make('td', schemaText(value)), make('td', value.description ?? '', 'soft')));
  }}
  return table;
}}
function tryIt(path, method, operation, shown) {{
  const box = make('div'), inputs = {{}};
  for (const parameter of shown) {{
    if (parameter.in !== 'path') continue;
    const input = make('input');
    input.placeholder = parameter.name;
    inputs[parameter.name] = input;
    put(box, input, ' ');
  }}
  const content = operation.requestBody?.content?.['application/json'];
  let body = null;
  if (content) {{
    body = make('input');
    body.style.width = '100%';
    body.value = JSON.stringify(Object.values(content.examples ?? {{}})[0]?.value ?? {{}});
    put(box, body);
  }}
  const send = make('button', 'Ask this device'), out = make('pre');
  out.hidden = true;
  send.addEventListener('click', async () => {{
    let target = path;
    for (const key in inputs) target = target.replace(`{{${{key}}}}`, encodeURIComponent(inputs[key].value));
    try {{
      const answer = await ask(target, {{method: method.toUpperCase(), body: body?.value}});
      const text = await answer.text();
      out.textContent = answer.status + ' ' + answer.statusText + '\\n' + text.slice(0, 20000);
    }} catch (error) {{ out.textContent = String(error); }}
    out.hidden = false;
  }});
  return put(box, put(make('p'), send), out);
}}
(async () => {{
  const api = await (await ask('/openapi.json')).json();
  const resolve = value => value.$ref ? api.components[value.$ref.split('/')[2]][name(value.$ref)] : value;
  $('about').textContent = api.info.version;
  $('note').textContent = api.info.description;
  for (const tag of api.tags) {{
    const box = put(make('section', null, 'card'), make('h2', tag.name), make('p', tag.description, 'soft'));
    const all = Object.entries(api.paths).flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, operation]) => [path, method, operation]));
    for (const [path, method, operation] of all) {{
      if (!operation.tags.includes(tag.name)) continue;
      const entry = make('details');
      put(entry, put(make('summary'), make('span', method.toUpperCase(), 'method'), make('code', path), ' ',
        make('span', operation.summary)));
      if (operation.description) put(entry, make('p', operation.description));
      const shown = (operation.parameters ?? []).map(resolve);
      if (shown.length) {{
        const table = make('table');
        for (const p of shown) put(table, put(make('tr'), put(make('td'), make('code', p.name)),
          make('td', p.in), make('td', p.description ?? '', 'soft')));
        put(entry, make('h3', 'Parameters'), table);
      }}
      const kinds = Object.entries(operation.requestBody?.content ?? {{}});
      if (kinds.length) put(entry, make('h3', 'Body'),
        ...kinds.map(([kind, value]) =>
          put(make('div'), make('code', kind), ' ' + schemaText(value.schema))));
      const answers = make('table');
      for (const [status, value] of Object.entries(operation.responses)) {{
        const response = resolve(value);
        put(answers, put(make('tr'), make('td', status), make('td', response.description),
          make('td', Object.entries(response.content ?? {{}})
            .map(([kind, value]) => schemaText(value.schema) || kind).join(', '), 'soft')));
      }}
      put(entry, make('h3', 'Answers'), answers, make('h3', 'Try it'), tryIt(path, method, operation, shown));
      put(box, entry);
    }}
    put($('operations'), box);
  }}
  for (const [title, schema] of Object.entries(api.components.schemas)) {{
    const entry = put(make('details'), make('summary', title));
    put(entry, schema.properties ? fields(schema) : make('p', schemaText(schema)), json(schema));
    put($('schemas'), entry);
  }}
}})().catch(error => {{ $('note').textContent = String(error); }});
</script>
</html>
""".encode()

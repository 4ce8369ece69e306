//! The report as one page that needs nothing else: no script, no style from elsewhere, plots drawn in SVG.

use std::fmt::Write as _;

use super::sums::{Counts, Sums};

/// How many names of each kind the page shows.
const SHOWN: usize = 50;

const STYLE: &str = "
:root{color-scheme:light dark;--ground:#f6f7f5;--card:#fff;--line:#d9dedb;--text:#17211f;--quiet:#55625f;--bar:#1f7a80;--rest:#c9d6d4}
@media (prefers-color-scheme:dark){:root{--ground:#111615;--card:#1a2120;--line:#35403d;--text:#e8eeec;--quiet:#a4b2ae;--bar:#4fb3b8;--rest:#3a4a48}}
body{margin:0 auto;max-width:64rem;padding:1.5rem;background:var(--ground);color:var(--text);font:15px/1.5 system-ui,sans-serif;font-variant-numeric:tabular-nums}
h1{font-size:1.3rem;margin:0}h2{font-size:1rem;margin:2rem 0 .5rem}p{margin:.2rem 0;color:var(--quiet)}
table{width:100%;border-collapse:collapse;background:var(--card);border:1px solid var(--line)}
th,td{padding:.4rem .7rem;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;overflow-wrap:anywhere}
thead th{font-size:.8rem;color:var(--quiet)}
svg{display:block;width:100%;background:var(--card);border:1px solid var(--line)}
.bar{fill:var(--bar)}.rest{fill:var(--rest)}text{fill:var(--quiet);font:11px system-ui,sans-serif}
";

/// The page.
pub(super) fn page(sums: &Sums) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, \
         initial-scale=1\"><title>optin-proxy report</title><style>{STYLE}</style></head><body>\n<h1>What optin-proxy found \
         and did</h1>\n"
    );
    let Counts { writes, findings, changed, rescued, refused, exhausted } = sums.all;
    // Writing into a string cannot fail.
    let _ = writeln!(
        page,
        "<p>{writes} contact writes had a finding or a refusal{}. {findings} findings, {changed} of them changed; {rescued} \
         writes rescued by a retry; {} refusals reached a client ({refused} true of what was sent, {exhausted} not).</p>",
        sums.period.as_ref().map_or_else(String::new, |(from, to)| format!(
            " from {} to {}",
            text(from),
            text(to)
        )),
        refused + exhausted,
    );
    if sums.lost > 0 {
        let _ = writeln!(page, "<p>The trail itself says that {} lines were lost.</p>", sums.lost);
    }
    for (title, names) in sums.dimensions() {
        if names.is_empty() {
            continue;
        }
        let _ = writeln!(page, "<h2>By {title}</h2>");
        if title == "day" {
            plot(&mut page, &names);
        }
        let _ = writeln!(
            page,
            "<table><thead><tr><th>{title}</th><th>writes</th><th>findings</th><th>changed</th><th>rescued</th><th>refused</th>\
             <th>exhausted</th></tr></thead><tbody>"
        );
        for (name, counts) in names.iter().take(SHOWN) {
            let _ = write!(page, "<tr><td>{}</td>", text(name));
            for column in counts.columns() {
                let _ = write!(page, "<td>{column}</td>");
            }
            page.push_str("</tr>\n");
        }
        page.push_str("</tbody></table>\n");
        if names.len() > SHOWN {
            let _ = writeln!(page, "<p>and {} more</p>", names.len() - SHOWN);
        }
    }
    page.push_str("</body></html>\n");
    page
}

/// Findings by day: those that were changed, and the rest.
fn plot(page: &mut String, days: &[(&str, &Counts)]) {
    let most = days.iter().map(|(_, counts)| counts.findings).max().unwrap_or(0).max(1);
    let width = 960.0 / days.len() as f64;
    let _ = write!(
        page,
        "<svg viewBox=\"0 0 960 180\" role=\"img\" aria-label=\"Findings by day, at most {most}\">"
    );
    for (position, (day, counts)) in days.iter().enumerate() {
        let of = |count: u64| count as f64 / most as f64 * 140.0;
        let (x, wide) = (position as f64 * width + width * 0.1, width * 0.8);
        for (class, count) in [("rest", counts.findings), ("bar", counts.changed)] {
            let tall = of(count);
            let _ = write!(
                page,
                "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{wide:.1}\" height=\"{tall:.1}\"><title>{}: {} findings, \
                 {} changed</title></rect>",
                155.0 - tall,
                text(day),
                counts.findings,
                counts.changed,
            );
        }
    }
    if let (Some((first, _)), Some((last, _))) = (days.first(), days.last()) {
        let _ = writeln!(
            page,
            "<text x=\"4\" y=\"172\">{}</text><text x=\"956\" y=\"172\" text-anchor=\"end\">{}</text><text x=\"4\" \
             y=\"12\">{most}</text></svg>",
            text(first),
            text(last),
        );
    }
}

/// Text as it may stand in a page.
fn text(plain: &str) -> String {
    let mut safe = String::with_capacity(plain.len());
    for char in plain.chars() {
        match char {
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '&' => safe.push_str("&amp;"),
            '"' => safe.push_str("&quot;"),
            other => safe.push(other),
        }
    }
    safe
}

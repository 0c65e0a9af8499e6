//! The page a person sees instead of the sandbox's own. It needs nothing but itself: no script, no font, no image.

use std::fmt::Write;

use crate::refusal::Wording;

/// Nothing may be loaded or run from the page, whatever ends up in it.
pub(crate) const SECURITY_POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'";

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1c2530;--soft:#5d6b7a;--paper:#f4f6f8;--card:#fff;--line:#dde3e9;--accent:#2f7d6d}\
@media(prefers-color-scheme:dark){:root{--ink:#e8edf2;--soft:#93a1af;--paper:#12171d;--card:#1a2129;--line:#2b3540;\
--accent:#6cc4b1}}\
*{box-sizing:border-box}\
body{margin:0;min-height:100vh;display:grid;place-items:center;padding:1.5rem;background:var(--paper);\
color:var(--ink);font:16px/1.55 system-ui,sans-serif}\
main{width:100%;max-width:34rem;padding:2.25rem;background:var(--card);border:1px solid var(--line);\
border-radius:50% 50% 12px 12px/3.5rem 3.5rem 12px 12px;box-shadow:0 12px 40px #0001}\
p{margin:.75rem 0 0}.status{margin:0;color:var(--accent);font-weight:600;letter-spacing:.04em}\
h1{margin:.25rem 0 0;font-size:1.6rem;line-height:1.25}.hint{color:var(--soft)}\
dl{display:grid;grid-template-columns:auto 1fr;gap:.35rem 1rem;margin:1.5rem 0 0;padding-top:1.25rem;\
border-top:1px solid var(--line)}\
dt{color:var(--soft)}dd{margin:0;font-family:ui-monospace,monospace;overflow-wrap:anywhere}";

pub(crate) fn render(wording: &Wording) -> String {
    let mut details = String::new();
    let port = wording.port.map(|port| port.to_string());
    for (name, value) in [("Sandbox", wording.sandbox_id.as_deref()), ("Port", port.as_deref())] {
        if let Some(value) = value {
            write!(details, "<dt>{name}</dt><dd>{}</dd>", escaped(value)).expect("a string takes everything");
        }
    }
    if !details.is_empty() {
        details = format!("<dl>{details}</dl>");
    }
    let title = escaped(wording.title);
    let message = escaped(&wording.message);
    let hint = escaped(wording.hint);
    let status = wording.status.as_u16();
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><meta name=\"robots\" content=\"noindex\">\
         <title>{title}</title><style>{STYLE}</style></head><body><main>\
         <p class=\"status\">{status}</p><h1>{title}</h1><p>{message}.</p><p class=\"hint\">{hint}</p>{details}\
         </main></body></html>\n"
    )
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            character => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::StatusCode;

    #[test]
    fn everything_is_escaped() {
        let hostile = "<script>alert('1')</script>&\"";
        let page = render(&Wording {
            status: StatusCode::BAD_GATEWAY,
            title: "<script>",
            message: hostile.to_owned(),
            hint: "<script>",
            sandbox_id: Some(hostile.to_owned()),
            port: Some(80),
        });
        assert!(!page.contains("<script"), "{page}");
        assert!(!page.contains('\''), "{page}");
        assert_eq!(page.matches("&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&amp;&quot;").count(), 2);
    }
}

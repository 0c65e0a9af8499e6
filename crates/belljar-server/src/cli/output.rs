//! What commands print: tables for people, JSON for programs, failures with their causes.

use std::io::{IsTerminal, Write};

use serde::Serialize;

/// Prints a failure and what caused it, a line each.
pub(crate) fn failure(failure: &anyhow::Error) {
    let mut stderr = std::io::stderr().lock();
    let (red, plain) = if stderr.is_terminal() { ("\x1b[31m", "\x1b[0m") } else { ("", "") };
    // Nothing can be done if standard error is closed.
    let _ = writeln!(stderr, "{red}error{plain}: {failure}");
    for cause in failure.chain().skip(1) {
        let _ = writeln!(stderr, "  because: {cause}");
    }
}

/// Prints text to standard output. A reader that has seen enough, as of `| head`, is no failure.
pub(crate) fn text(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Prints a value as JSON.
pub(crate) fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    text(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Prints rows under a heading, each column as wide as its widest cell.
pub(crate) fn table<const COLUMNS: usize>(heading: [&str; COLUMNS], rows: &[[String; COLUMNS]]) -> anyhow::Result<()> {
    let mut widths = heading.map(|cell| cell.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: [&str; COLUMNS]| {
        let padded: Vec<String> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = line(heading) + "\n";
    for row in rows {
        lines += &line(std::array::from_fn(|column| row[column].as_str()));
        lines.push('\n');
    }
    text(&lines)
}

/// A moment as people read it.
pub(crate) fn moment(epoch_ms: i64) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]:[second] UTC");
    time::OffsetDateTime::from_unix_timestamp(epoch_ms / 1000)
        .ok()
        .and_then(|moment| moment.format(&format).ok())
        .unwrap_or_else(|| epoch_ms.to_string())
}

//! The `Content-Disposition` of a part of an upload, whose file name is a whole path.

/// The value of the parameter `filename`, if there is one.
///
/// Quoted values are unescaped twice over: backslashes as MIME has it, and the three characters that browsers and the
/// SDKs' HTTP libraries write as `%22`, `%0D` and `%0A`.
pub(super) fn file_name(header: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(header).ok()?;
    let mut rest = text.split_once(';')?.1;
    loop {
        let (name, after) = rest.split_once('=')?;
        let (value, after) = take_value(after.trim_start())?;
        if name.trim().eq_ignore_ascii_case("filename") {
            return Some(value.replace("%22", "\"").replace("%0D", "\r").replace("%0A", "\n"));
        }
        rest = after.split_once(';')?.1;
    }
}

/// A parameter's value and what follows it.
fn take_value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(';').unwrap_or(text.len());
        return Some((text[..end].trim().to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((position, character)) = characters.next() {
        match character {
            '"' => return Some((value, &quoted[position + 1..])),
            '\\' => match characters.next()? {
                (_, escaped @ ('"' | '\\')) => value.push(escaped),
                (_, other) => value.extend(['\\', other]),
            },
            _ => value.push(character),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_paths_are_kept() {
        for (header, expected) in [
            (r#"form-data; name="file"; filename="/home/user/a b.txt""#, Some("/home/user/a b.txt")),
            (r#"form-data; filename="a"; name="file""#, Some("a")),
            (r#"form-data; name="file"; FileName=plain ; x=y"#, Some("plain")),
            (r#"form-data; name="file"; filename="a\\b\"c""#, Some(r#"a\b"c"#)),
            (r#"form-data; name="file"; filename="say %22hi%22""#, Some(r#"say "hi""#)),
            (r#"form-data; name="x; filename=no"; filename="yes""#, Some("yes")),
            ("form-data; name=\"file\"; filename=\"žluť.txt\"", Some("žluť.txt")),
            (r#"form-data; name="file""#, None),
            (r#"form-data; name="file"; filename="unfinished"#, None),
            ("form-data", None),
        ] {
            assert_eq!(file_name(header.as_bytes()).as_deref(), expected, "{header}");
        }
        assert_eq!(file_name(b"form-data; filename=\"\xff\""), None);
    }
}

//! `GET /files`: a file as it is, streamed.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use async_compression::tokio::bufread::GzipEncoder;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use rustix::fs::OFlags;
use tokio::io::{AsyncRead, AsyncReadExt, BufReader};
use tokio_util::io::ReaderStream;

use super::Parameters;
use super::encoding::{self, Encoding};
use crate::error::HttpError;
use crate::state::Sandbox;

/// What is read at once; together with what the connection buffers, all the memory a download needs.
const READ_BYTES: usize = 256 << 10;

pub(crate) async fn download(
    State(sandbox): State<Sandbox>,
    Parameters(query): Parameters,
    headers: HeaderMap,
) -> Result<Response, HttpError> {
    let user = query.user(&sandbox)?;
    let asked = query.path.clone().unwrap_or_default();
    let path = sandbox
        .resolve(&asked, &user)
        .map_err(|error| HttpError::bad_request(format!("error expanding and resolving path '{asked}': {error}")))?;
    let opened = tokio::task::spawn_blocking({
        let path = path.clone();
        move || open(path)
    });
    let (file, length) = opened.await.map_err(|error| HttpError::internal(error.to_string()))??;
    let encoding = encoding::for_answer(&headers).map_err(|error| {
        HttpError::new(StatusCode::NOT_ACCEPTABLE, format!("error parsing Accept-Encoding: {error}"))
    })?;

    let file = tokio::fs::File::from_std(file);
    let mut response = match (encoding, length) {
        (Encoding::Gzip, _) => {
            let compressed = GzipEncoder::new(BufReader::with_capacity(READ_BYTES, file));
            let mut response = streamed(compressed);
            response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            response
        }
        (Encoding::Identity, Some(length)) => {
            // A file that grows meanwhile must not outgrow the length announced.
            let mut response = streamed(file.take(length));
            response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
            response
        }
        (Encoding::Identity, None) => streamed(file),
    };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    headers.insert(header::CONTENT_DISPOSITION, content_disposition(&path));
    Ok(response)
}

fn streamed(reader: impl AsyncRead + Send + 'static) -> Response {
    Body::from_stream(ReaderStream::with_capacity(reader, READ_BYTES)).into_response()
}

/// Opens a file and tells its length; none for those that only reading tells, as in `/proc`.
fn open(path: PathBuf) -> Result<(File, Option<u64>), HttpError> {
    let failed = |error: io::Error| HttpError::internal(format!("error opening file '{}': {error}", path.display()));
    // Opening a FIFO would wait for a writer.
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).expect("a flag of open(2), which takes an int");
    let mut file = match OpenOptions::new().read(true).custom_flags(nonblocking).open(&path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Err(HttpError::new(StatusCode::NOT_FOUND, format!("path '{}' does not exist", path.display())));
        }
        Err(error) => return Err(failed(error)),
    };
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return Err(HttpError::bad_request(format!("path '{}' is a directory", path.display())));
    }
    if !metadata.is_file() {
        return Err(HttpError::bad_request(format!("path '{}' is not a regular file", path.display())));
    }
    if metadata.len() > 0 {
        return Ok((file, Some(metadata.len())));
    }
    let is_empty = file.read(&mut [0]).map_err(failed)? == 0;
    file.rewind().map_err(failed)?;
    Ok((file, is_empty.then_some(0)))
}

/// `inline`, with the file's name: in full for those who read RFC 5987, and what ASCII has of it for the others.
fn content_disposition(path: &Path) -> HeaderValue {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let plain: String =
        name.chars().map(|c| if c.is_ascii_graphic() && c != '"' && c != '\\' || c == ' ' { c } else { '_' }).collect();
    let mut value = format!("inline; filename=\"{plain}\"");
    if plain != name {
        value.push_str("; filename*=utf-8''");
        for byte in name.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                value.push(char::from(byte));
            } else {
                value.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    HeaderValue::from_str(&value).unwrap_or_else(|_| HeaderValue::from_static("inline"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_in_the_header() {
        for (name, expected) in [
            ("/a/report.txt", "inline; filename=\"report.txt\""),
            ("/a/a b.txt", "inline; filename=\"a b.txt\""),
            ("/a/q\".txt", "inline; filename=\"q_.txt\"; filename*=utf-8''q%22.txt"),
            ("/a/ž\n", "inline; filename=\"__\"; filename*=utf-8''%C5%BE%0A"),
        ] {
            assert_eq!(content_disposition(Path::new(name)), expected, "{name:?}");
        }
    }

    #[test]
    fn lengths_are_told_where_they_can_be_trusted() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("file");
        std::fs::write(&path, "four").expect("written");
        assert_eq!(open(path.clone()).expect("opened").1, Some(4));
        std::fs::write(&path, "").expect("written");
        assert_eq!(open(path).expect("opened").1, Some(0));
        assert_eq!(open("/proc/self/status".into()).expect("opened").1, None);
    }

    #[test]
    fn only_files_are_served() {
        let status = |path: &Path| open(path.to_owned()).expect_err("refused").status;
        let directory = tempfile::tempdir().expect("a temporary directory");
        assert_eq!(status(directory.path()), StatusCode::BAD_REQUEST);
        assert_eq!(status(&directory.path().join("missing")), StatusCode::NOT_FOUND);
        assert_eq!(status(Path::new("/dev/null")), StatusCode::BAD_REQUEST);
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
            .expect("made");
        assert_eq!(status(&fifo), StatusCode::BAD_REQUEST);
    }
}

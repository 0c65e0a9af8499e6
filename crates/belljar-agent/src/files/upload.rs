//! `POST /files`: one file as the body, or several as a multipart form.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_compression::tokio::bufread::GzipDecoder;
use axum::Json;
use axum::body::{Body, BodyDataStream};
use axum::extract::State;
use belljar_protocol::envd::METADATA_HEADER_PREFIX;
use belljar_protocol::envd::rest::{UploadedFile, UploadedFileType};
use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use http::{HeaderMap, StatusCode, header};
use tokio::io::{AsyncRead, AsyncWriteExt, BufWriter};
use tokio_util::io::{ReaderStream, StreamReader};

use super::encoding::{self, Encoding};
use super::staging::{self, Staged, StagingError};
use super::{Parameters, disposition};
use crate::error::HttpError;
use crate::filesystem;
use crate::filesystem::metadata::{self, Metadata};
use crate::state::Sandbox;
use crate::users::User;

/// How long a client may send nothing in the middle of an upload.
const IDLE: Duration = Duration::from_secs(300);

/// Bytes collected before they go to disk at once.
const WRITE_BYTES: usize = 256 << 10;

/// The only form field that is a file.
const FILE_FIELD: &str = "file";

/// What is still read, and for how long, of an upload that has failed: a client that is busy sending would otherwise
/// see a broken connection instead of the answer.
const DRAIN_BYTES: usize = 256 << 20;
const DRAIN_TIME: Duration = Duration::from_secs(30);

pub(crate) async fn upload(
    State(sandbox): State<Sandbox>,
    Parameters(query): Parameters,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Vec<UploadedFile>>, HttpError> {
    let mut body = Incoming::new(body);
    let stored = match Upload::new(&sandbox, &query, &headers) {
        Ok(upload) => upload.receive(&headers, &mut body).await,
        Err(error) => Err(error),
    };
    if stored.is_err() {
        body.drain().await;
    }
    stored.map(Json)
}

/// The request's body, still readable after whoever decoded it has given up.
struct Incoming {
    stream: BodyDataStream,
}

impl Incoming {
    fn new(body: Body) -> Self {
        Self { stream: body.into_data_stream() }
    }

    fn chunks(&mut self) -> impl Stream<Item = io::Result<Bytes>> + Send + Unpin + '_ {
        Box::pin(stream::unfold(&mut self.stream, |stream| async move {
            let chunk = match tokio::time::timeout(IDLE, stream.next()).await {
                Ok(chunk) => chunk?.map_err(io::Error::other),
                Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the client stopped sending")),
            };
            Some((chunk, stream))
        }))
    }

    async fn drain(&mut self) {
        let mut left = DRAIN_BYTES;
        let rest = async {
            while let Some(Ok(chunk)) = self.stream.next().await {
                left = left.saturating_sub(chunk.len());
                if left == 0 {
                    return;
                }
            }
        };
        // Out of patience: the client gets its answer as it is.
        let _ = tokio::time::timeout(DRAIN_TIME, rest).await;
    }
}

/// What all files of one request have in common.
struct Upload<'a> {
    sandbox: &'a Sandbox,
    /// From the query. Required unless the files bring their own.
    path: Option<&'a str>,
    user: User,
    metadata: Metadata,
    /// For the message when the disk is full.
    announced_bytes: Option<u64>,
}

impl<'a> Upload<'a> {
    fn new(sandbox: &'a Sandbox, query: &'a super::FileQuery, headers: &HeaderMap) -> Result<Self, HttpError> {
        let metadata = metadata_headers(headers);
        metadata::validate(&metadata).map_err(|error| HttpError::bad_request(format!("invalid metadata: {error}")))?;
        let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(Self {
            sandbox,
            path: query.path.as_deref(),
            user: query.user(sandbox)?,
            metadata,
            announced_bytes: announced.filter(|bytes| *bytes > 0),
        })
    }

    async fn receive(self, headers: &HeaderMap, body: &mut Incoming) -> Result<Vec<UploadedFile>, HttpError> {
        let encoding = encoding::of_body(headers)
            .map_err(|error| HttpError::bad_request(format!("error decompressing request body: {error}")))?;
        let plain = StreamReader::new(body.chunks());
        let reader: Box<dyn AsyncRead + Send + Unpin + '_> = match encoding {
            Encoding::Identity => Box::new(plain),
            Encoding::Gzip => Box::new(GzipDecoder::new(plain)),
        };
        let chunks = ReaderStream::with_capacity(reader, WRITE_BYTES);

        let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let media_type = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        if media_type == "application/octet-stream" {
            let path = self
                .path
                .ok_or_else(|| HttpError::bad_request("path query parameter is required for raw body upload"))?;
            let path = self.resolve(path)?;
            return Ok(vec![self.store(path, chunks).await?]);
        }
        if !media_type.starts_with("multipart/") {
            return Err(HttpError::bad_request(format!(
                "unsupported content type: {content_type}, expected multipart/form-data or application/octet-stream"
            )));
        }
        let boundary = multer::parse_boundary(content_type)
            .map_err(|error| HttpError::bad_request(format!("error parsing multipart form: {error}")))?;
        self.receive_form(multer::Multipart::new(chunks, boundary)).await
    }

    async fn receive_form(&self, mut form: multer::Multipart<'_>) -> Result<Vec<UploadedFile>, HttpError> {
        let mut stored: Vec<UploadedFile> = Vec::new();
        while let Some(field) = form.next_field().await.map_err(read_error)? {
            if field.name() != Some(FILE_FIELD) {
                continue;
            }
            let path = match self.path {
                Some(path) => path.to_owned(),
                None => field
                    .headers()
                    .get(header::CONTENT_DISPOSITION)
                    .and_then(|value| disposition::file_name(value.as_bytes()))
                    .ok_or_else(|| HttpError::bad_request("filename not found in Content-Disposition header"))?,
            };
            let path = self.resolve(&path)?;
            if stored.iter().any(|file| Path::new(&file.path) == path) {
                return Err(HttpError::bad_request(format!(
                    "you cannot upload multiple files to the same path '{}' in one upload request, only the first \
                     specified file was uploaded",
                    path.display()
                )));
            }
            stored.push(self.store(path, field).await?);
        }
        Ok(stored)
    }

    fn resolve(&self, path: &str) -> Result<PathBuf, HttpError> {
        self.sandbox
            .resolve(path, &self.user)
            .map_err(|error| HttpError::bad_request(format!("error resolving path: {error}")))
    }

    /// Streams `chunks` to disk and makes them the file at `path`.
    async fn store<E: Into<ReadError>>(
        &self,
        path: PathBuf,
        mut chunks: impl Stream<Item = Result<Bytes, E>> + Unpin,
    ) -> Result<UploadedFile, HttpError> {
        let (target, owner) = (path.clone(), self.user.clone());
        let staged = blocking(move || {
            if let Some(parent) = target.parent() {
                filesystem::ensure(parent, &owner).map_err(|error| match error {
                    filesystem::FilesystemError::FileInTheWay(_) => HttpError::bad_request(error.describe()),
                    _ => HttpError::internal(format!("error ensuring directories: {}", error.describe())),
                })?;
            }
            Staged::begin(&target).map_err(staging_error)
        })
        .await?;

        let file = tokio::fs::File::from_std(staged.writer().map_err(staging_error)?);
        let mut writer = BufWriter::with_capacity(WRITE_BYTES, file);
        while let Some(chunk) = chunks.try_next().await.map_err(read_error)? {
            writer.write_all(&chunk).await.map_err(|error| self.write_error(&error))?;
        }
        writer.flush().await.map_err(|error| self.write_error(&error))?;

        let (owner, metadata, finished) = (self.user.clone(), self.metadata.clone(), path.clone());
        let kept = blocking(move || {
            staged.finish(&owner, &metadata).map_err(staging_error)?;
            Ok(metadata::read(&finished))
        })
        .await?;
        Ok(UploadedFile {
            name: path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            path: path.to_string_lossy().into_owned(),
            r#type: UploadedFileType::File,
            metadata: kept,
        })
    }

    fn write_error(&self, error: &io::Error) -> HttpError {
        if !staging::is_full(error) {
            return HttpError::internal(format!("error writing file: {error}"));
        }
        let full = StagingError::NoSpace;
        let message = match self.announced_bytes {
            Some(bytes) => format!("attempted to write {bytes} bytes: {full}"),
            None => full.to_string(),
        };
        HttpError::new(StatusCode::INSUFFICIENT_STORAGE, message)
    }
}

/// Why a request's body could not be read.
enum ReadError {
    Body(io::Error),
    Form(multer::Error),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self::Body(error)
    }
}

impl From<multer::Error> for ReadError {
    fn from(error: multer::Error) -> Self {
        Self::Form(error)
    }
}

/// Whoever still listens sent something wrong.
fn read_error(error: impl Into<ReadError>) -> HttpError {
    match error.into() {
        ReadError::Body(error) if error.kind() == io::ErrorKind::TimedOut => {
            HttpError::new(StatusCode::REQUEST_TIMEOUT, error.to_string())
        }
        ReadError::Body(error) => HttpError::bad_request(format!("error reading request body: {error}")),
        ReadError::Form(error) => HttpError::bad_request(format!("error reading form: {error}")),
    }
}

fn staging_error(error: StagingError) -> HttpError {
    let status = match error {
        StagingError::IsADirectory(_) | StagingError::NotWritable(_) => StatusCode::BAD_REQUEST,
        StagingError::NoInodes | StagingError::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        StagingError::Io { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    };
    HttpError::new(status, error.describe())
}

async fn blocking<T: Send + 'static>(
    operation: impl FnOnce() -> Result<T, HttpError> + Send + 'static,
) -> Result<T, HttpError> {
    tokio::task::spawn_blocking(operation).await.map_err(|error| HttpError::internal(error.to_string()))?
}

/// `X-Metadata-Author: me` is the metadata `author` = `me`. Of a repeated header the first counts.
fn metadata_headers(headers: &HeaderMap) -> Metadata {
    let mut metadata = BTreeMap::new();
    for (name, value) in headers {
        if let Some(key) = name.as_str().strip_prefix(METADATA_HEADER_PREFIX).filter(|key| !key.is_empty()) {
            metadata.entry(key.to_owned()).or_insert_with(|| String::from_utf8_lossy(value.as_bytes()).into_owned());
        }
    }
    metadata
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_comes_from_headers_with_lower_case_keys() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("x-metadata-author", "me"), ("x-metadata-author", "you"), ("x-metadata-", "?"), ("x-other", "?")]
        {
            headers.append(name, value.parse().expect("a header value"));
        }
        assert_eq!(metadata_headers(&headers), Metadata::from([("author".into(), "me".into())]));
    }
}

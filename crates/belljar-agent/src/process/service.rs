//! The Connect service `process.Process`.

use std::io;
use std::process::{ChildStderr, ChildStdin, ChildStdout};
use std::sync::Arc;

use belljar_protocol::envd::process::process_input::Input;
use belljar_protocol::envd::process::stream_input_request::Event as InputEvent;
use belljar_protocol::envd::process::{
    CloseStdinRequest, CloseStdinResponse, ConnectRequest, ConnectResponse, ListRequest, ListResponse, Process as Api,
    ProcessInfo, ProcessInput, SendInputRequest, SendInputResponse, SendSignalRequest, SendSignalResponse, Signal,
    StartRequest, StartResponse, StreamInputRequest, StreamInputResponse, UpdateRequest, UpdateResponse,
};
use connectrpc::{
    ConnectError, ErrorCode, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures::StreamExt;
use rustix::process::Rlimit;
use tokio::net::unix::pipe;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::children::Children;
use super::driver::Driver;
use super::events::{connect_response, events, keepalive_interval, start_response};
use super::launch::{self, SpawnFailure, StartError, StdioKind};
use super::output::{OutputLog, Subscription};
use super::stdin::{self, Stdin, StdinError};
use super::table::{FindError, Process, Table};
use crate::state::Sandbox;
use crate::users::User;

/// Everything `process.Process` needs; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct ProcessService {
    sandbox: Sandbox,
    children: Children,
    table: Arc<Table>,
    tasks: TaskTracker,
    /// How many files a command may open.
    open_files: Rlimit,
}

impl ProcessService {
    pub(crate) fn new(sandbox: Sandbox, children: Children, open_files: Rlimit) -> Self {
        Self { sandbox, children, table: Arc::default(), tasks: TaskTracker::new(), open_files }
    }

    /// Kills every process and what it started.
    pub(crate) async fn kill_all(&self) {
        for process in self.table.running() {
            process.killed.cancel();
            if let Err(error) = self.children.kill_tree(process.pid).await {
                tracing::error!(%error, pid = process.wire_pid(), "a process could not be killed");
            }
        }
    }

    async fn start_process(
        self,
        request: StartRequest,
        user: User,
        deadline: Option<Instant>,
    ) -> Result<(Arc<Process>, Subscription), StartError> {
        let config = request.process.into_option().ok_or(StartError::NothingToStart)?;
        // Absent means yes: SDKs before the field existed expect it.
        let stdio = StdioKind::Pipes { stdin: request.stdin.unwrap_or(true) };
        let command = launch::prepare(&config, &user, stdio, &self.sandbox, self.open_files)?;
        let failed = |error| StartError::spawn(&config, &error);
        let spawned = self.children.spawn(command).await.map_err(failed)?;
        let (pid, exit) = (spawned.pid, spawned.exit);
        let pipes = match Pipes::open(spawned.stdin, spawned.stdout, spawned.stderr) {
            Ok(pipes) => pipes,
            Err(error) => {
                // Started, but nobody could ever read it.
                self.children.kill_tree(pid).await.map_err(failed)?;
                return Err(failed(error));
            }
        };
        let (stdin, writer) = match pipes.stdin {
            None => (Stdin::disabled(), None),
            Some(pipe) => {
                let (stdin, queue) = Stdin::piped();
                (stdin, Some(self.tasks.spawn(stdin::serve(pipe, queue))))
            }
        };
        let process = Arc::new(Process {
            pid,
            tag: request.tag,
            config,
            output: Arc::new(OutputLog::default()),
            stdin,
            killed: CancellationToken::new(),
        });
        // Before the first byte can be read, so that this client gets all of them.
        let subscription = process.output.subscribe();
        self.table.insert(Arc::clone(&process));
        let driver = Driver {
            process: Arc::clone(&process),
            stdout: pipes.stdout,
            stderr: pipes.stderr,
            stdin: writer,
            exit,
            deadline,
            children: self.children.clone(),
            table: Arc::clone(&self.table),
            tasks: self.tasks.clone(),
        };
        self.tasks.spawn(driver.run());
        Ok((process, subscription))
    }

    async fn input(&self, process: &Process, input: Option<ProcessInput>) -> Result<(), ConnectError> {
        match input.and_then(|input| input.input) {
            Some(Input::Stdin(data)) => process.stdin.write(data).await.map_err(stdin_error),
            Some(Input::Pty(_)) => Err(not_served("PTYs are")),
            None => Err(ConnectError::invalid_argument("no input given: neither stdin nor pty")),
        }
    }
}

// Concrete return types say more than the trait's `impl Encodable`, and nobody outside this crate sees them.
#[expect(refining_impl_trait)]
impl Api for ProcessService {
    async fn list(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, ListRequest>,
    ) -> ServiceResult<ListResponse> {
        let info = |process: Arc<Process>| ProcessInfo {
            config: process.config.clone().into(),
            pid: process.wire_pid(),
            tag: process.tag.clone(),
        };
        Response::ok(ListResponse { processes: self.table.running().into_iter().map(info).collect() })
    }

    async fn start(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, StartRequest>,
    ) -> ServiceResult<ServiceStream<StartResponse>> {
        let request = request.to_owned_message();
        if request.pty.is_set() {
            return Err(not_served("PTYs are"));
        }
        let user = self.sandbox.user_of(context.headers()).map_err(crate::connect_errors::user)?;
        let deadline = context.deadline().map(Instant::from_std);
        // Not part of this request: a client that leaves now must not leave a half-started process behind.
        let starting = self.tasks.spawn(self.clone().start_process(request, user, deadline));
        let (process, subscription) =
            starting.await.map_err(|error| ConnectError::internal(error.to_string()))?.map_err(start_error)?;
        let keepalive = keepalive_interval(context.headers());
        Response::stream_ok(events(process.wire_pid(), subscription, keepalive, start_response))
    }

    async fn connect(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, ConnectRequest>,
    ) -> ServiceResult<ServiceStream<ConnectResponse>> {
        let selector = request.to_owned_message().process.into_option().and_then(|process| process.selector);
        let process = self.table.find(selector.as_ref()).map_err(find_error)?;
        let keepalive = keepalive_interval(context.headers());
        Response::stream_ok(events(process.wire_pid(), process.output.subscribe(), keepalive, connect_response))
    }

    async fn update(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, UpdateRequest>,
    ) -> ServiceResult<UpdateResponse> {
        Err(not_served("PTYs are"))
    }

    async fn stream_input(
        &self,
        _context: RequestContext,
        mut requests: InboundStream<StreamInputRequest>,
    ) -> ServiceResult<StreamInputResponse> {
        let mut target = None;
        while let Some(request) = requests.next().await {
            match request?.to_owned_message().event {
                Some(InputEvent::Start(start)) => {
                    let selector = start.process.into_option().and_then(|process| process.selector);
                    target = Some(self.table.find_running(selector.as_ref()).map_err(find_error)?);
                }
                Some(InputEvent::Data(data)) => {
                    let process = target.as_ref().ok_or_else(|| {
                        ConnectError::invalid_argument("the stream must name its process before it sends data")
                    })?;
                    self.input(process, data.input.into_option()).await?;
                }
                Some(InputEvent::Keepalive(_)) => {}
                None => return Err(ConnectError::invalid_argument("empty event")),
            }
        }
        Response::ok(StreamInputResponse::default())
    }

    async fn send_input(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<SendInputResponse> {
        let request = request.to_owned_message();
        let selector = request.process.into_option().and_then(|process| process.selector);
        let process = self.table.find_running(selector.as_ref()).map_err(find_error)?;
        self.input(&process, request.input.into_option()).await?;
        Response::ok(SendInputResponse::default())
    }

    async fn send_signal(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, SendSignalRequest>,
    ) -> ServiceResult<SendSignalResponse> {
        let request = request.to_owned_message();
        let selector = request.process.into_option().and_then(|process| process.selector);
        let process = self.table.find_running(selector.as_ref()).map_err(find_error)?;
        let sent = match request.signal.as_known() {
            Some(Signal::SIGNAL_SIGKILL) => {
                process.killed.cancel();
                self.children.kill_tree(process.pid).await
            }
            Some(Signal::SIGNAL_SIGTERM) => self.children.terminate(process.pid).await,
            Some(Signal::SIGNAL_UNSPECIFIED) | None => {
                return Err(ConnectError::unimplemented("invalid signal: only SIGTERM and SIGKILL can be sent"));
            }
        };
        sent.map_err(|error| ConnectError::internal(format!("error sending signal: {error}")))?;
        Response::ok(SendSignalResponse::default())
    }

    async fn close_stdin(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, CloseStdinRequest>,
    ) -> ServiceResult<CloseStdinResponse> {
        let selector = request.to_owned_message().process.into_option().and_then(|process| process.selector);
        let process = self.table.find_running(selector.as_ref()).map_err(find_error)?;
        process.stdin.close().await;
        Response::ok(CloseStdinResponse::default())
    }
}

/// The agent's ends of a command's pipes, ready for the runtime.
struct Pipes {
    stdin: Option<pipe::Sender>,
    stdout: pipe::Receiver,
    stderr: pipe::Receiver,
}

impl Pipes {
    fn open(stdin: Option<ChildStdin>, stdout: Option<ChildStdout>, stderr: Option<ChildStderr>) -> io::Result<Self> {
        let missing = || io::Error::other("a pipe is missing");
        Ok(Self {
            stdin: stdin.map(|stdin| pipe::Sender::from_owned_fd(stdin.into())).transpose()?,
            stdout: pipe::Receiver::from_owned_fd(stdout.ok_or_else(missing)?.into())?,
            stderr: pipe::Receiver::from_owned_fd(stderr.ok_or_else(missing)?.into())?,
        })
    }
}

fn not_served(what: &str) -> ConnectError {
    ConnectError::unimplemented(format!("{what} not served yet"))
}

/// What can't be started is the request's fault, unless the sandbox is full.
fn start_error(error: StartError) -> ConnectError {
    let code = match &error {
        StartError::Spawn { kind: SpawnFailure::OutOfResources, .. } => ErrorCode::ResourceExhausted,
        StartError::Spawn { kind: SpawnFailure::Permanent, .. }
        | StartError::NothingToStart
        | StartError::Directory(_)
        | StartError::NoSuchDirectory(_)
        | StartError::NotADirectory(_) => ErrorCode::InvalidArgument,
    };
    ConnectError::new(code, error.to_string())
}

fn find_error(error: FindError) -> ConnectError {
    let code = match error {
        FindError::NoSuchPid(_) | FindError::NoSuchTag(_) => ErrorCode::NotFound,
        FindError::NothingSelected => ErrorCode::InvalidArgument,
    };
    ConnectError::new(code, error.to_string())
}

fn stdin_error(error: StdinError) -> ConnectError {
    ConnectError::failed_precondition(format!("error writing to stdin: {error}"))
}

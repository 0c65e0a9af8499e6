//! Commands: starting them, their output and input, signals, their end.
//!
//! ```text
//!             Start                                       Connect
//!               │                                            │
//!   service ────┼──────────────── events of one ◄────────────┘
//!               ▼                 subscription
//!   children: one thread              ▲
//!   forks, reaps, kills               │ cursor each
//!               │                     │
//!               ▼                     │
//!   driver: one task ── pumps ──► OutputLog ── End
//!   per process          stdout, stderr
//! ```
//!
//! A process belongs to the sandbox, not to the request that started it: when that stream breaks off, the process goes
//! on, and `Connect` finds it by its pid or tag. What it prints goes through its [`output::OutputLog`], whose header
//! says what happens when nobody reads, or when somebody reads too slowly.
//!
//! A process ends when it has exited *and* its output is closed, as with envd. A child that it left running with its
//! output open holds the end back until that child closes it, the process is killed, or its deadline passes.
//! Afterwards it is remembered for [`RETENTION`](table::RETENTION), so that a `Connect` that comes too late still
//! learns how it ended and what was not read.
//!
//! A request's deadline (`Connect-Timeout-Ms`) is the process's deadline if the request is `Start`: then the whole
//! tree is killed. On every other request it only ends the request.

mod children;
mod driver;
mod events;
mod exit;
mod launch;
mod limit;
mod output;
mod service;
mod stdin;
mod sys;
mod table;
mod tree;

pub(crate) use children::Children;
pub(crate) use exit::Exit;
pub(crate) use limit::ProcessLimit;
pub(crate) use service::ProcessService;
pub(crate) use tree::Whom;

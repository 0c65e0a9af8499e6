//! Puts the agent into the server's binary.
//!
//! The agent is linked statically, which needs flags that no dependency of a crate can have, so it is built first
//! (`make build` does) and found here: where `BELLJAR_AGENT_BIN` says, else where cargo puts it. Without it the server
//! still compiles, for checks and unit tests, but refuses to start.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-env-changed=BELLJAR_AGENT_BIN");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("belljar-agent");
    let source = env::var_os("BELLJAR_AGENT_BIN").map_or_else(usual_place, PathBuf::from);
    println!("cargo::rerun-if-changed={}", source.display());
    if source.is_file() {
        fs::copy(&source, &out).expect("the agent can be copied");
    } else {
        println!("cargo::warning=there is no agent at {}; this build can't start sandboxes", source.display());
        fs::write(&out, []).expect("the output directory can be written");
    }
}

fn usual_place() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    target.join("x86_64-unknown-linux-gnu/release/belljar-agent")
}

//! Generates the envd messages and services from `proto/`. protox compiles the definitions in pure Rust, so a build
//! needs no `protoc`.

use std::path::PathBuf;

use anyhow::Context;
use buffa_codegen::BytesRepr;
use connectrpc_build::CodeGenConfig;
use protox::prost::Message;

fn main() -> anyhow::Result<()> {
    const FILES: [&str; 2] = ["process.proto", "filesystem.proto"];
    println!("cargo:rerun-if-changed=proto");

    let out_dir = PathBuf::from(std::env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?);
    let descriptors = out_dir.join("envd_descriptors.bin");
    std::fs::write(&descriptors, protox::compile(FILES, ["proto"])?.encode_to_vec())?;

    let mut messages = CodeGenConfig::default();
    messages.generate_json = true;
    // Nothing here forwards messages it only half understands.
    messages.preserve_unknown_fields = false;
    // A chunk of a command's output goes to every subscriber by reference count.
    messages.bytes_fields = vec![(".".to_owned(), BytesRepr::Bytes)];

    connectrpc_build::Config::new()
        .descriptor_set(&descriptors)
        .files(&FILES)
        .buffa_config(messages)
        .client_feature_name("client")
        .include_file("_connectrpc.rs")
        .compile()
}

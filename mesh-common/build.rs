//! Generates the control plane's gRPC API. `protox` parses the schema, so no `protoc` is needed.

fn main() {
    println!("cargo::rerun-if-changed=proto");
    #[cfg(feature = "user")]
    generate();
}

#[cfg(feature = "user")]
fn generate() {
    let descriptors = protox::compile(["proto/nodemesh.proto"], ["proto"])
        .unwrap_or_else(|error| panic!("proto/nodemesh.proto: {error}"));
    tonic_prost_build::configure()
        .compile_fds(descriptors)
        .unwrap_or_else(|error| panic!("generating the gRPC API: {error}"));
}

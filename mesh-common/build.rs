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
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let server = out.join("server");
    std::fs::create_dir_all(&server)
        .unwrap_or_else(|error| panic!("{}: {error}", server.display()));
    tonic_prost_build::configure()
        .build_server(false)
        .out_dir(out)
        .compile_fds(descriptors.clone())
        .and_then(|()| {
            tonic_prost_build::configure()
                .build_client(false)
                .extern_path(".nodemesh.v1", "crate::api")
                // What all agents are told is encoded once, not once for each.
                .extern_path(".nodemesh.v1.Snapshot", "crate::api::Encoded")
                .out_dir(server)
                .compile_fds(descriptors)
        })
        .unwrap_or_else(|error| panic!("generating the gRPC API: {error}"));
}

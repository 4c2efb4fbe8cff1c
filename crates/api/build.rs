//! Generates the gRPC code without a protoc on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let ours = ["proto/countersign/v1/mesh.proto", "proto/countersign/v1/sidecar.proto"];
    let standard = ["proto/spiffe/workload.proto", "proto/envoy/sds.proto"];
    let descriptors = protox::compile(ours.iter().chain(&standard), ["proto"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}

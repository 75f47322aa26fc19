#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nodemesh_fuzz::checks::shared(data));

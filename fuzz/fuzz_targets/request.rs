//! The canonical request, fed with whatever a fuzzer finds.

#![no_main]

#[path = "../canonical.rs"]
mod canonical;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    canonical::check(bytes);
});

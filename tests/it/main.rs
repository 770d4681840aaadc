//! One integration-test binary: rules of the code, the parts over real sockets, whole clusters of real processes.

mod api;
mod cluster;
mod edges;
mod formats;
mod fuzz;
mod h2c;
mod hop;
mod judge;
mod limits;
mod measure;
mod openapi;
mod operators;
mod pages;
mod peers;
mod proxy;
mod schema;
mod services;
mod source;
mod stop;
mod terms;
mod tidy;
mod ways;
mod words;

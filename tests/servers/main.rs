//! Real programs, stock from the distribution, through fifty applies and undos under load: no failed query, no wrong
//! answer, no lost connection.
//!
//! Each server runs in a folder of its own on Unix sockets or loopback and is stopped by its PID. A server that is not
//! installed is skipped and says so.

#[path = "../common/mod.rs"]
mod common;
mod mariadb;
mod nginx;
mod postgres;
mod python;
mod redis;
mod service;
mod stock;
mod tools;

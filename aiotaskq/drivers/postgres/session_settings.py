"""Settings of a session that the URL of a PostgreSQL server may have as options."""

from __future__ import annotations

from typing import Final

SESSION_SETTINGS: Final = frozenset(
    """
    application_name array_nulls backend_flush_after backslash_quote bytea_output
    check_function_bodies client_connection_check_interval client_min_messages commit_delay
    commit_siblings composite_type_mismatch compute_query_id constraint_exclusion
    cpu_index_tuple_cost cpu_operator_cost cpu_tuple_cost createrole_self_grant
    cursor_tuple_fraction datestyle deadlock_timeout default_statistics_target
    default_table_access_method default_tablespace default_text_search_config
    default_toast_compression default_transaction_deferrable default_transaction_isolation
    default_transaction_read_only dynamic_library_path effective_cache_size
    effective_io_concurrency enable_async_append enable_bitmapscan enable_distinct_reordering
    enable_gathermerge enable_group_by_reordering enable_hashagg enable_hashjoin
    enable_incremental_sort enable_indexonlyscan enable_indexscan enable_material enable_memoize
    enable_mergejoin enable_nestloop enable_parallel_append enable_parallel_hash
    enable_partition_pruning enable_partitionwise_aggregate enable_partitionwise_join
    enable_presorted_aggregate enable_self_join_elimination enable_seqscan enable_sort
    enable_tidscan escape_string_warning event_triggers extra_float_digits from_collapse_limit
    geqo geqo_effort geqo_generations geqo_pool_size geqo_seed geqo_selection_bias geqo_threshold
    gin_fuzzy_search_limit gin_pending_list_limit hash_mem_multiplier icu_validation_level
    idle_in_transaction_session_timeout idle_session_timeout intervalstyle io_combine_limit jit
    jit_above_cost jit_inline_above_cost jit_optimize_above_cost join_collapse_limit lc_messages
    lc_monetary lc_numeric lc_time lo_compat_privileges local_preload_libraries lock_timeout
    log_duration log_min_duration_statement log_min_error_statement log_min_messages log_statement
    logical_decoding_work_mem maintenance_io_concurrency maintenance_work_mem
    max_parallel_maintenance_workers max_parallel_workers max_parallel_workers_per_gather
    max_stack_depth min_parallel_index_scan_size min_parallel_table_scan_size options
    parallel_leader_participation parallel_setup_cost parallel_tuple_cost password_encryption
    plan_cache_mode quote_all_identifiers random_page_cost role row_security scram_iterations
    search_path seq_page_cost session_preload_libraries session_replication_role
    standard_conforming_strings statement_timeout synchronous_commit tcp_keepalives_count
    tcp_keepalives_idle tcp_keepalives_interval temp_buffers temp_file_limit temp_tablespaces
    timezone timezone_abbreviations track_activities track_functions track_io_timing
    transaction_deferrable transaction_isolation transaction_read_only transaction_timeout
    transform_null_equals vacuum_buffer_usage_limit vacuum_cost_delay vacuum_cost_limit
    vacuum_cost_page_dirty vacuum_cost_page_hit vacuum_cost_page_miss vacuum_failsafe_age
    vacuum_freeze_min_age vacuum_freeze_table_age vacuum_multixact_failsafe_age
    vacuum_multixact_freeze_min_age vacuum_multixact_freeze_table_age wal_compression
    wal_init_zero wal_recycle wal_sender_timeout wal_skip_threshold work_mem xmlbinary xmloption
    """.split()  # noqa: SIM905 - two hundred words are easier to read without quotes
)
"""Names of settings, in lower case, that an ordinary user may change in PostgreSQL 13 to 18.

Settings for developers of the server are left out; ``options=-c%20name%3Dvalue`` sets any other.
"""

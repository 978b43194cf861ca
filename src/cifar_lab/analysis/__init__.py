"""Many runs compared, from their folders alone: tables, statistics, the report, the claims."""

-- Keep a file from being deleted for a while; returns 0 if it is gone. Who holds it already may go on.
-- An actor may only read the list of files; since a script's KEYS count as written, it comes as an argument.
-- KEYS[1] = readers
-- ARGV[1] = name, ARGV[2] = reader id, ARGV[3] = milliseconds, ARGV[4] = files listed
local member = ARGV[1] .. '|' .. ARGV[2]
if redis.call('HEXISTS', ARGV[4], ARGV[1]) == 0 and not redis.call('ZSCORE', KEYS[1], member) then return {0} end
redis.call('ZADD', KEYS[1], now_ms() + tonumber(ARGV[3]), member)
return {1}

-- Keep a version from being deleted for a while; returns 0 if it is gone.
-- KEYS[1] = versions, KEYS[2] = readers
-- ARGV[1] = version, ARGV[2] = reader id, ARGV[3] = milliseconds
if tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or '0') <= 0 then return {0} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[3]), ARGV[1] .. '|' .. ARGV[2])
return {1}

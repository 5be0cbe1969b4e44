-- Keep a file from being deleted for a while; returns 0 if it is gone. Who holds it already may go on.
-- KEYS[1] = files listed, KEYS[2] = readers
-- ARGV[1] = name, ARGV[2] = reader id, ARGV[3] = milliseconds
local member = ARGV[1] .. '|' .. ARGV[2]
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 and not redis.call('ZSCORE', KEYS[2], member) then return {0} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[3]), member)
return {1}

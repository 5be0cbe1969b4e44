-- Prelude after server.lua and fenced.lua: is this still the queue that its learner has made agree with itself?
-- KEYS[1] = state, KEYS[2] = queue, KEYS[3] = accepted, KEYS[4] = committed, KEYS[5] = leases, KEYS[6] = holders,
-- KEYS[7] = todo, KEYS[8] = heldout
-- ARGV[1] = fence, ARGV[2] = ticks that the caller has seen, ARGV[3] = producers that it has committed groups of
local synced = redis.call('HMGET', KEYS[1], 'server', 'ticks', 'queued', 'in_line', 'bytes', 'admitted')
if synced[1] ~= server_id() then return {'LOST', 'its server restarted'} end
-- The server may be the same and its data older: a replica that was promoted, demoted and promoted again.
if tonumber(synced[2]) < tonumber(ARGV[2]) then return {'LOST', 'it went back to older data'} end
if redis.call('XLEN', KEYS[2]) ~= tonumber(synced[3]) then return {'LOST', 'entries of the queue are gone'} end
if redis.call('HEXISTS', KEYS[3], '') == 0 or redis.call('HLEN', KEYS[4]) < tonumber(ARGV[3]) then
  return {'LOST', 'sequence numbers are gone'}
end
if redis.call('LLEN', KEYS[7]) + redis.call('LLEN', KEYS[8]) ~= tonumber(synced[4]) then
  return {'LOST', 'leases in line are gone'}
end
-- Holders have one field more, which is there even when nobody holds anything: both may be gone.
if redis.call('ZCARD', KEYS[5]) + 1 ~= redis.call('HLEN', KEYS[6]) then return {'LOST', 'leases are gone'} end
